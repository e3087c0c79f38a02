"""What is finished of a job, on disk: each defense with its numbers, so that a rerun goes on.

Nothing is pickled. A folder per defense is written beside its place and moved there whole.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probdefense.checks import Checks
from probdefense.checks.results import Check
from probdefense.core.defense import Defense
from probdefense.core.persistence import load, save
from probdefense.evaluation.certification import Certificate
from probdefense.evaluation.report import Report

FOLDER = "defenses"
DEFENSE, ABOUT, CHECKS, CERTIFICATE = "defense.safetensors", "study.json", "checks.json", "certificate"


class Found(NamedTuple):
    """What one defense is and was found to keep."""

    defense: Any
    reports: list[Report]
    seconds: float
    checks: Checks | None
    certificate: Certificate | None


def keep(folder: Path, name: str, found: Found, about: dict[str, Any]) -> None:
    """Writes what is known of a defense, all or nothing.

    Args:
        folder: Of the job.
        name: Of the defense.
        found: What it is and keeps.
        about: What its numbers depend on; what another job asks for is not taken for it.

    Raises:
        OSError: the folder cannot be written.
    """
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder / FOLDER) as partial:
        place = Path(partial) / name
        _write(place, found, about)
        target = folder / FOLDER / name
        shutil.rmtree(target, ignore_errors=True)
        os.replace(place, target)


def _write(place: Path, found: Found, about: dict[str, Any]) -> None:
    report = sum(found.reports[1:], found.reports[0])
    report.save(place)
    (place / ABOUT).write_text(json.dumps({"seconds": found.seconds, "settings": about}, indent=2) + "\n")
    if isinstance(found.defense, Defense):
        save(found.defense, place / DEFENSE, accuracy=report.rows[0]["accuracy"], data=about["data"])
    if found.checks is not None:
        text = json.dumps([dataclasses.asdict(check) for check in found.checks], indent=2)
        (place / CHECKS).write_text(text + "\n")
    if found.certificate is not None:
        _write_certificate(found.certificate, place)


def kept(folder: Path, name: str, about: dict[str, Any], net: Any) -> Found | None:
    """What is known of a defense that was finished before; None if it was not.

    The defense itself is None where no file holds it: then its recipe makes it anew.

    Args:
        folder: Of the job.
        name: Of the defense.
        about: What its numbers depend on.
        net: A function that makes a network like that of the defense.

    Raises:
        ValueError: it was made for another study, or its files are damaged.
    """
    place = folder / FOLDER / name
    if not (place / ABOUT).is_file():
        return None
    try:
        noted = json.loads((place / ABOUT).read_text())
        before, seconds = noted["settings"], noted["seconds"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(place) from error
    now = json.loads(json.dumps(about))
    if changed := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
        told = ", ".join(f"{key} was {before.get(key)} and is {now.get(key)}" for key in changed[:3])
        raise ValueError(
            f"expected --resume of the same study, got another: {place} was made where {told}; leave out "
            "--resume to begin anew, or choose another --out"
        )
    report = Report.load(place)
    checks = _checks(place) if (place / CHECKS).exists() else None
    certificate = _certificate(place) if (place / f"{CERTIFICATE}.json").exists() else None
    reports = [report.only(each) for each in report.defenses]
    return Found(_defense(place / DEFENSE, net), reports, seconds, checks, certificate)


def judged(folder: Path) -> dict[str, tuple[Checks | None, Certificate | None]]:
    """What was checked and certified of every defense that is kept in the folder of a job.

    Raises:
        ValueError: damaged files.
    """
    places = sorted(path for path in (folder / FOLDER).glob("*") if (path / ABOUT).is_file())
    return {
        place.name: (
            _checks(place) if (place / CHECKS).exists() else None,
            _certificate(place) if (place / f"{CERTIFICATE}.json").exists() else None,
        )
        for place in places
    }


def _defense(path: Path, net: Any) -> Any:
    try:
        return load(path, net=net()) if path.exists() else None
    except (ValueError, TypeError):  # arguments that no file holds, a network of the recipe's own
        return None


def _checks(place: Path) -> Checks:
    try:
        return Checks(tuple(Check(**each) for each in json.loads((place / CHECKS).read_text())))
    except (ValueError, TypeError) as error:
        raise _damaged(place) from error


def _write_certificate(found: Certificate, place: Path) -> None:
    """Tensors into one file, the rest into another."""
    values = {each.name: getattr(found, each.name) for each in dataclasses.fields(found)}
    tensors = {name: value.cpu().numpy() for name, value in values.items() if isinstance(value, Tensor)}
    np.savez_compressed(place / f"{CERTIFICATE}.npz", **tensors)  # type: ignore[arg-type]
    rest = {name: value for name, value in values.items() if name not in tensors}
    (place / f"{CERTIFICATE}.json").write_text(json.dumps(rest) + "\n")


def _certificate(place: Path) -> Certificate:
    try:
        rest = json.loads((place / f"{CERTIFICATE}.json").read_text())
        with (place / f"{CERTIFICATE}.npz").open("rb") as file, np.load(file) as arrays:
            rest |= {name: torch.as_tensor(arrays[name]) for name in arrays.files}
        return Certificate(**rest)
    except (ValueError, TypeError, OSError) as error:
        raise _damaged(place) from error


def _damaged(place: Path) -> ValueError:
    return ValueError(f"expected a finished defense in {place}, got damaged files; remove that folder")
