"""``probdefense compare`` from its options to its files."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from probdefense import files
from probdefense.data import Split
from probdefense.study import console, job, pool, store, studies
from probdefense.study.fabric import device_of, launched
from probdefense.study.job import Request, Result
from probdefense.study.request import naming


def run(options: Mapping[str, Any], given: Collection[str]) -> None:
    """Does what the command was asked for.

    Args:
        options: Their values by name.
        given: Those that were given, and so count more than a study file.

    Raises:
        typer.BadParameter: a request that cannot be done, or a place that cannot be written.
    """
    out = options["out"]
    with _refusing():
        request, split = job.prepare(_asked(options, given))
        with naming("--device"):
            fabric = launched(device_of(request.device))
    first = fabric is None or fabric.is_global_zero
    if first:
        with _writing(out):
            files.reserve(out, files.ROOM)
    result = _result(request, split, options, fabric)
    if first:
        _finish(result, request, out, options["as_json"], options["verbose"])


def _result(request: Request, split: Split, options: Mapping[str, Any], fabric: Any) -> Result:
    several = len(request.defenses) * len(request.all_seeds)
    alone = fabric is not None or device_of(request.device).type != "cpu"
    with (
        console.progress(job.STEPS * several, fabric is None or fabric.is_global_zero) as (say, step),
        _refusing(),
    ):
        return job.run(
            request,
            split,
            say,
            1 if alone else pool.cores(),
            folder=options["out"] if several > 1 or options["resume"] else None,
            resume=options["resume"],
            fabric=fabric,
            step=step,
        )


def _finish(result: Result, request: Request, out: Path, as_json: bool, verbose: bool) -> None:
    if not as_json:
        console.show(result, verbose)  # before the files, so that a full disk does not cost the result
    with _writing(out):
        written = job.write(result, out)
        job.keep_all(result, request, out)
    if as_json:
        print((out / "report.json").read_text(), end="")
        return
    print("\n".join(f"wrote {out / name}" for name in (*written, job.STUDY, store.FOLDER)))
    if "posterior.nc" not in written:
        print("no posterior.nc: none of these defenses is random")


def _asked(options: Mapping[str, Any], given: Collection[str]) -> Request:
    """The request of the options, on top of the study file if there is one."""
    own: dict[str, Any] = {
        "defenses": _names(options["defenses"]),
        "attacks": _names(options["attacks"]),
        "recipes": tuple(options["recipes"] or ()),
    }
    own |= {name: options[name] for name in PLAIN}
    request = Request(**own)
    if options["study"] is not None:
        with naming("--study"):
            request = replace(request, **studies.read(options["study"]))
        request = replace(request, **{name: value for name, value in own.items() if name in given})
    if options["seeds"] is not None:
        with naming("--seeds"):
            if "seed" in given:
                raise ValueError("expected --seed or --seeds, got both; leave one out")
            request = replace(request, **studies.seeded(_numbers(options["seeds"])))
    elif "seed" in given:
        request = replace(request, seeds=())
    return request


PLAIN = ("data", "eps", "num_samples", "epochs", "seed", "quick", "data_root", "net", "device")
"""Options that are fields of a request as they are."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"expected whole numbers with commas, as in 0,1,2, got {text}") from error


@contextmanager
def _refusing() -> Iterator[None]:
    """Inside, what cannot be done is one sentence."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        if isinstance(error, ChildProcessError):
            raise
        raise typer.BadParameter(str(error)) from error


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Inside, a folder that is a file, read-only or full is refused."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        stays = "nothing there was changed: make room there"
        if (out / store.FOLDER).exists():
            stays = (
                f"what was finished stays in {store.FOLDER}: make room there and run it again with --resume"
            )
        raise typer.BadParameter(
            f"cannot write to --out {out} ({reason}); {stays}, or choose another folder"
        ) from error
