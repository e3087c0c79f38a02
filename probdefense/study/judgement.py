"""The judgement of one defense of the user's: what is asked, and what it is found to keep."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, default_collate

from probdefense import data as datasets
from probdefense.evaluation.certification import Certificate, certify
from probdefense.evaluation.examples import batches
from probdefense.evaluation.protocol import evaluate
from probdefense.evaluation.report import Report
from probdefense.rng import derive
from probdefense.study.fabric import device_of, launched
from probdefense.study.opponents import attack_names, check_budget, named_attack, suite_budget
from probdefense.study.pool import steady
from probdefense.study.request import FULL, versions
from probdefense.study.targets import Target, check_images, looked_up, target
from probdefense.types import Attack, Labels, Norm
from probdefense.validation import check_count, check_member

NORMS: dict[str, Norm] = {"inf": math.inf, "2": 2, "1": 1}
"""The norms of a threat model, as the command spells them."""

LOADED = 256
"""Images that are read at a time."""


@dataclass(frozen=True)
class Asked:
    """What is judged, on what, and where; see the command for every one of them."""

    target: str
    weights: Path | None = None
    data: str = "digits"
    data_root: Path | None = None
    images: int = FULL["images"]
    chunk_size: int = 256
    device: str = "auto"
    seed: int = 0
    name: str | None = None


class Ready(NamedTuple):
    """What is judged, loaded and checked: nothing is wrong with it that can be known before the work."""

    target: Target
    loader: DataLoader
    fabric: Any
    asked: Asked

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.fabric is None or bool(self.fabric.is_global_zero)

    @property
    def about(self) -> dict[str, Any]:
        """What the numbers depend on, beside what `evaluate` notes itself."""
        return {"versions": versions(), "data": self.asked.data, "num_examples": len(self.loader.dataset)}  # type: ignore[arg-type]


class Refused(ValueError):
    """A request that cannot be done, and the option that is to blame."""

    def __init__(self, option: str, error: Exception):
        super().__init__(str(error))
        self.option = option


def prepare(asked: Asked) -> Ready:
    """Loads the target and the data, and refuses what cannot be judged, before any work.

    Raises:
        Refused: a number, device, target or data set that is none; or images that do not fit the target.
    """
    for option, count, least in (("--images", asked.images, 1), ("--chunk-size", asked.chunk_size, 1)):
        _blamed(option, check_count, option, count, least)
    _blamed("--seed", check_count, "--seed", asked.seed, 0)
    device = _blamed("--device", device_of, asked.device)
    judged = _blamed("--weights" if asked.weights else "TARGET", target, asked.target, asked.weights)
    judged = judged._replace(name=_blamed("--name", _check_name, asked.name or judged.name))
    test = _blamed("--data", datasets.load, asked.data, asked.data_root).test
    fabric = _blamed("--device", launched, device)
    loader = _loader(test, asked, device if fabric is None else fabric.device)
    if isinstance(judged.logits_fn, torch.nn.Module):
        judged.logits_fn.to(device if fabric is None else fabric.device)
    _blamed("--data", lambda: check_images(judged, *next(batches(loader))))
    return Ready(judged, loader, fabric, asked)


def _blamed(option: str, function: Any, *arguments: Any) -> Any:
    try:
        with steady():
            return function(*arguments)
    except (ValueError, TypeError, FloatingPointError, OSError, ImportError) as error:
        raise Refused(option, error) from error


def _check_name(name: str) -> str:
    if name in ("clean", "worst") or "/" in name:
        raise ValueError(
            f"expected a name other than 'clean' and 'worst' and without '/', got {name!r}; the report uses "
            "these itself: give --name"
        )
    return name


def _loader(test: Any, asked: Asked, device: torch.device) -> DataLoader:
    """The first images of a test set, on the device, in the order that they have."""

    def collate(batch: Any) -> list[Tensor]:
        return [torch.as_tensor(part).to(device) for part in default_collate(batch)]

    kept = Subset(test, range(min(asked.images, len(test))))
    return DataLoader(kept, LOADED, collate_fn=collate, generator=torch.Generator())


def attacks_named(names: Sequence[str], ready: Ready, norm: Norm) -> dict[str, Attack]:
    """The attacks by the names that the command knows, and those of ``FILE.py:NAME``, at the usual budget.

    Raises:
        ValueError: an unknown name, a file that fails, or a target that needs a larger budget.
    """
    judged, gradients = ready.target, FULL["gradients"]
    x = next(batches(ready.loader))[0][:1]
    found: dict[str, Attack] = {}
    for name in names:
        if ".py:" in name:
            found[name.rpartition(":")[2]] = looked_up(name)
            continue
        check_member("attack", name, ["clean", *attack_names(), "FILE.py:NAME"])
        if name != "clean":
            check_budget(name, {}, judged.name, judged.logits_fn, x, gradients=gradients, norm=norm)
            found[name] = named_attack(name, judged.logits_fn, gradients)
    return found


def radii(text: str | None, data: str, norm: Norm) -> list[float]:
    """The radii of ``--eps``, or the usual one of the data set.

    Raises:
        ValueError: no numbers, or no usual one.

    Examples:
        >>> radii("0.1,0.2", "digits", 2), radii(None, "mnist", math.inf)
        ([0.1, 0.2], [0.3])
    """
    if text is None:
        if norm == math.inf and data in datasets.SOURCES:
            return [datasets.SOURCES[data].eps]
        raise ValueError(
            "expected a radius in pixels, or several with commas, got none; only the data sets that come by "
            "name have a usual one, for the norm inf"
        )
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"expected numbers with commas, got {text}; 8 of 255 gray levels are 0.0314"
        ) from error
    if not all(eps > 0 and (eps <= 1 or norm != math.inf) and eps < math.inf for eps in found):
        raise ValueError(f"expected radii in pixels, above 0 and for the norm inf at most 1, got {text}")
    return found


def evaluated(
    ready: Ready, attacks: dict[str, Attack], norm: Norm, eps: list[float], num_samples: int, journal: Path
) -> Report:
    """The report of the target; chunks that are in the journal are not run again."""
    with steady():
        report = evaluate(
            ready.target.logits_fn,
            ready.loader,
            attacks,
            norm=norm,
            eps=eps,
            num_samples=num_samples,
            seed=ready.asked.seed,
            name=ready.target.name,
            chunk_size=ready.asked.chunk_size,
            journal=journal,
            fabric=ready.fabric,
        )
    budget = {"gradients": FULL["gradients"], "suite_budget": suite_budget(FULL["gradients"])}
    report.settings = {**ready.about, **budget, **report.settings}
    return report


def certified(ready: Ready, n0: int, n: int, alpha: float, journal: Path) -> tuple[Certificate, Labels]:
    """The certificate of the target and the labels of the images."""
    with steady():
        certificate = certify(
            ready.target.logits_fn,
            ready.loader,
            n0=n0,
            n=n,
            alpha=alpha,
            seed=derive(ready.asked.seed, "certificate"),
            chunk_size=ready.asked.chunk_size,
            journal=journal,
            fabric=ready.fabric,
        )
    return certificate, torch.cat([y for _, y in ready.loader])
