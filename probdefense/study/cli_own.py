"""The commands for what a user brings along: ``evaluate``, ``certify`` and ``report``."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

TargetName = Annotated[
    str,
    typer.Argument(
        metavar="FILE.py:NAME|CHECKPOINT",
        help="A network, a Defense, a LogitsFn or a function that makes one; or a file of probdefense.save.",
        show_default=False,
    ),
]
Weights = Annotated[Path | None, typer.Option(help="Trained weights for what FILE.py:NAME makes.")]
Data = Annotated[
    str, typer.Option(help="A data set by name, folder:PATH, or FILE.py:NAME; its test part is used.")
]
DataRoot = Annotated[Path | None, typer.Option(help="Folder of the data; PROBDEFENSE_DATA if absent.")]
Images = Annotated[int, typer.Option(help="So many test images, from the first on.")]
ChunkSize = Annotated[int, typer.Option(help="Images at a time; what is finished is kept by chunk.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option(help="Of attacks, verdicts and votes.")]
Name = Annotated[str | None, typer.Option(help="In the report; that of the function or file if absent.")]
Out = Annotated[Path, typer.Option(help="Folder to write to; run the same command again to go on there.")]


def evaluate(
    target: TargetName,
    weights: Weights = None,
    data: Data = "digits",
    attacks: Annotated[
        str, typer.Option(help="Comma-separated names, or FILE.py:NAME of your own; see 'probdefense list'.")
    ] = "clean,eot_pgd,suite",
    norm: Annotated[str, typer.Option(help="inf, 2 or 1.")] = "inf",
    eps: Annotated[
        str | None, typer.Option(help="Radius in pixels, or several with commas; the data set's usual one.")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Draws behind every verdict.")] = 50,
    chunk_size: ChunkSize = 256,
    images: Images = 1000,
    device: Device = "auto",
    seed: Seed = 0,
    name: Name = None,
    data_root: DataRoot = None,
    out: Out = Path("out"),
) -> None:
    """Attack a defense of your own, and write a report that can be trusted.

    Writes report.json, timing.json, arrays.npz, robustness.png and report.html. What is finished is kept in
    the folder journal: killed and run again, the command goes on, and writes the same bytes.
    """
    from probdefense.evaluation.fingerprint import fingerprint
    from probdefense.study import console, findings, judgement, wording
    from probdefense.validation import check_count, check_member

    asked = judgement.Asked(target, weights, data, data_root, images, chunk_size, device, seed, name)
    with _refusing("--num-samples"):
        check_count("--num-samples", num_samples)
    with _refusing("--norm"):
        check_member("norm", norm, judgement.NORMS)
    power = judgement.NORMS[norm]
    with _refusing("TARGET"):
        ready = judgement.prepare(asked)
    with _refusing("--eps"):
        radii = judgement.radii(eps, data, power)
    with _refusing("--attacks"):
        chosen = judgement.attacks_named(_names(attacks), ready, power)
    with _refusing("TARGET"):
        fingerprint(ready.target.logits_fn, ready.target.name)  # which the journal needs
    with _writing(out, "--attacks"), _telling(out / "journal", ready.first):
        report = judgement.evaluated(ready, chosen, power, radii, num_samples, out / "journal")
    if ready.first:
        said = wording.judged(report, None, None, console.width())
        _finish(out, "\n".join(said), lambda: findings.write_report(report, out))


def certify(
    target: TargetName,
    weights: Weights = None,
    data: Data = "digits",
    n0: Annotated[int, typer.Option("--n0", help="Votes that choose the class.")] = 100,
    num_draws: Annotated[int, typer.Option("--num-draws", "-n", help="Votes that bound its share.")] = 1000,
    alpha: Annotated[float, typer.Option(help="The chance of a false certificate, per image.")] = 0.001,
    chunk_size: ChunkSize = 256,
    images: Images = 1000,
    device: Device = "auto",
    seed: Seed = 0,
    name: Name = None,
    data_root: DataRoot = None,
    out: Out = Path("out"),
) -> None:
    """Certify radii of a defense with normal noise on its input, by randomized smoothing.

    Writes certificate.json, and report.html anew where evaluate has written a report. What is finished is
    kept in the folder journal-certify.
    """
    from probdefense.evaluation.certification import smoothing_scale
    from probdefense.study import console, findings, judgement, wording
    from probdefense.validation import check_count, check_share

    asked = judgement.Asked(target, weights, data, data_root, images, chunk_size, device, seed, name)
    for option, count in (("--n0", n0), ("--num-draws", num_draws)):
        with _refusing(option):
            check_count(option, count)
    with _refusing("--alpha"):
        check_share("--alpha", alpha)
    with _refusing("TARGET"):
        ready = judgement.prepare(asked)
        smoothing_scale(ready.target.logits_fn)
    journal = out / "journal-certify"
    with _writing(out, "TARGET"), _telling(journal, ready.first):
        found, y = judgement.certified(ready, n0, num_draws, alpha, journal)
    if ready.first:
        table = wording.fitted(found.table(y, [s * found.sigma for s in findings.STEPS]), console.width())
        about = {**ready.about, "n0": n0, "num_draws": num_draws, "seed": seed}
        _finish(out, table, lambda: findings.write_certificate(ready.target.name, found, y, about, out))


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="What evaluate or compare wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; the one that is read, or 'out' for several.")
    ] = None,
) -> None:
    """Make report.html and robustness.png anew from what was saved: all but the images under attack.

    Several folders: every pair of defenses is compared; folders of the same defenses are seeds of their
    training, joined as replicates.
    """
    from probdefense.study import console, findings, wording

    place = out or (folders[0] if len(folders) == 1 else Path("out"))
    with _refusing("DIR"):
        drawn = findings.redrawn(folders)
    said = wording.judged(drawn.report, drawn.comparison, drawn.checks, console.width())
    _finish(place, "\n".join(said), lambda: findings.write_drawn(drawn, place))


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


@contextmanager
def _refusing(option: str) -> Iterator[None]:
    """What is wrong inside becomes one sentence that names the option."""
    try:
        yield
    except (ValueError, TypeError, FloatingPointError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error), param_hint=getattr(error, "option", option)) from error


@contextmanager
def _writing(out: Path, option: str) -> Iterator[None]:
    """Work whose finished parts are kept in a folder, which must have room."""
    from probdefense.files import ROOM, reserve

    made = not out.exists()
    try:
        reserve(out, ROOM)
        yield
    except OSError as error:
        raise _unwritable(out, error) from error
    except (ValueError, TypeError, FloatingPointError) as error:
        if made:
            with suppress(OSError):  # it has something finished in it
                out.rmdir()
        hint = "--out" if str(out / "journal") in str(error) else option
        raise typer.BadParameter(str(error), param_hint=hint) from error


@contextmanager
def _telling(journal: Path, first: bool) -> Iterator[None]:
    """Says at the end, in one line, how much of the work inside a journal had already."""
    before = len(list(journal.glob("*.npz")))
    yield
    if not (before and first):
        return
    parts = len(list(journal.glob("*.npz")))
    said = f"all {parts} parts; nothing ran again" if before == parts else f"{before} of {parts} parts"
    print(f"finished before, in {journal}: {said}", file=sys.stderr, flush=True)


def _finish(out: Path, table: str, write: Callable[[], list[str]]) -> None:
    """Prints what was found, before the files, so that a full disk does not cost it; then writes."""
    print(table)
    with _refusing("--out"):
        try:
            written = write()
        except OSError as error:
            raise _unwritable(out, error) from error
    print("\n".join(f"wrote {out / each}" for each in written))


def _unwritable(out: Path, error: OSError) -> Any:
    reason = error.strerror or str(error)
    return typer.BadParameter(
        f"cannot write to {out} ({reason}); what was finished stays in its journal: make room there and run "
        "the same command again, or choose another folder",
        param_hint="--out",
    )
