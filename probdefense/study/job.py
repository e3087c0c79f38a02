"""The main job: train the defenses asked for, attack each, write the report. The command's engine."""

import inspect
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from probdefense import attacks, objectives
from probdefense import data as datasets
from probdefense.checks import Checks
from probdefense.core.defense import Defense
from probdefense.data import Split
from probdefense.evaluation.certification import Certificate
from probdefense.evaluation.comparison import Comparison
from probdefense.evaluation.report import Report, Row
from probdefense.files import ROOM, reserve, together, whole
from probdefense.prediction import predict
from probdefense.study import plugins, store
from probdefense.study.findings import compared, joined
from probdefense.study.opponents import named_attack
from probdefense.study.pool import apart, steady, tell
from probdefense.study.recipes import RECIPES
from probdefense.study.request import Request, prepare, settings, versions
from probdefense.study.store import Found
from probdefense.study.studies import written
from probdefense.study.trial import STEPS, Family, about, judged, tested
from probdefense.types import Inputs, Labels

__all__ = [
    "STEPS",
    "Request",
    "Result",
    "catalog",
    "certified",
    "keep_all",
    "prepare",
    "run",
    "versions",
    "write",
]

ARVIZ_IMAGES = 100
"""Images whose predictions go into the ArviZ file."""

GRID_IMAGES = 6
"""Images that the report shows."""

STUDY = "study.toml"

FILES = ("report.json", "timing.json", "arrays.npz", "robustness.png", "report.html", "posterior.nc")
"""What a run writes; the last of them if a defense is random."""


@dataclass
class Result:
    """What a run found.

    Attributes:
        report: Every defense under every attack.
        made: The trained defenses.
        test: The images that were attacked, ``(x, y)``.
        comparison: Of every pair under the worst case, None for one defense.
        checks: By defense.
        certificates: By defense with certifiable input noise.
        images: By caption, clean and attacked images, labels, and the predictions before and after.
        found: All of it by seed and defense.
    """

    report: Report
    made: dict[str, Any]
    test: tuple[Inputs, Labels]
    comparison: Comparison | None
    checks: dict[str, Checks]
    certificates: dict[str, Certificate]
    images: dict[str, tuple[Any, ...]]
    found: dict[int, dict[str, Found]] = field(default_factory=dict)


def _nothing() -> None:
    """Does nothing."""


def _silent(line: str) -> None:
    """Says nothing."""


def run(
    request: Request,
    data: Split,
    say: Callable[[str], None] = _silent,
    processes: int = 1,
    *,
    folder: Path | None = None,
    resume: bool = False,
    fabric: Any = None,
    step: Callable[[], None] = _nothing,
) -> Result:
    """Trains, attacks and checks every defense, several at a time; the numbers are the same.

    Args:
        request: As `prepare` gives it.
        data: Training and test set.
        say: Gets one line per defense as it starts.
        processes: Defenses at a time.
        folder: Where to keep every defense, and the report so far, as soon as it is finished.
        resume: Whether to go on with what is kept there.
        fabric: The processes of a job that train and attack together.
        step: Called four times per defense.

    Raises:
        ChildProcessError: a process was killed.
        ValueError: what is kept is of another study.
        OSError: the folder cannot be written.
    """
    parts = [_of_seed(request, seed) for seed in request.all_seeds]
    families = [
        Family(names, part, data, _tell_line, _place(folder, part), resume, fabric, _tell_step)
        for part in parts
        for names in part.families
    ]
    found: dict[int, dict[str, Found]] = {part.seed: {} for part in parts}

    def done(number: int, family: dict[str, Found]) -> None:
        part = families[number].request
        found[part.seed] |= family
        if folder is not None and _first(fabric):
            with suppress(OSError):  # the end says so, and has the table
                _joined(part, data, found[part.seed]).save(families[number].folder or folder)
                write_study(request, folder)

    def heard(word: str | None) -> None:
        step() if word is None else say(word)

    apart(judged, families, processes, done, heard)
    several = [_joined(part, data, found[part.seed]) for part in parts]
    first = found[parts[0].seed]
    made = {name: first[name].defense for name in request.defenses}
    x, y = tested(request, data)
    with steady():
        total = joined(several)
        grid = _grid(request, made, (x[:GRID_IMAGES], y[:GRID_IMAGES]), total)
    return Result(
        total,
        made,
        (x, y),
        compared(several),
        {name: each.checks for name in made if (each := first[name]).checks is not None},
        {name: each.certificate for name in made if (each := first[name]).certificate is not None},
        grid,
        found,
    )


def write_study(request: Request, folder: Path) -> None:
    """Writes the study that a request comes to.

    Raises:
        OSError: the folder cannot be written.
    """
    with whole(folder / STUDY) as place:
        place.write_text(written(request))


def keep_all(result: Result, request: Request, folder: Path) -> None:
    """Writes the study, and every defense that is not kept yet.

    Raises:
        OSError: the folder cannot be written.
    """
    write_study(request, folder)
    for seed, found in result.found.items():
        part = _of_seed(request, seed)
        for name, each in found.items():
            place = _place(folder, part) or folder
            if not (place / store.FOLDER / name).exists():
                store.keep(place, name, each, about(part, name, len(result.test[1])))


def _tell_line(line: str) -> None:
    tell(line)


def _tell_step() -> None:
    tell(None)


def _first(fabric: Any) -> bool:
    """Whether this process is the one that writes."""
    return fabric is None or bool(fabric.is_global_zero)


def _of_seed(request: Request, seed: int) -> Request:
    return replace(request, seed=seed)


def _place(folder: Path | None, request: Request) -> Path | None:
    """Where the defenses of one seed are kept."""
    several = len(request.all_seeds) > 1
    return folder / f"seed-{request.seed}" if folder is not None and several else folder


def _joined(request: Request, data: Split, found: dict[str, Found]) -> Report:
    """The report of what is finished, in the order of the request."""
    ready = {name: found[name] for name in request.defenses if name in found}
    reports = [report for each in ready.values() for report in each.reports]
    total = sum(reports[1:], reports[0])
    timing = {**{f"{name}/training": each.seconds for name, each in ready.items()}, **total.timing}
    asked = settings(request, len(tested(request, data)[1]))
    return replace(total, settings={**asked, **total.settings}, timing=timing)


def _grid(
    request: Request, made: dict[str, Any], test: tuple[Inputs, Labels], report: Report
) -> dict[str, tuple[Any, ...]]:
    """A few images under PGD and the answers to them, of a defense that falls and one that holds."""
    x, y = test
    left: dict[str, float] = {}
    for row in report.rows:
        left[row["defense"]] = min(row["accuracy"], left.get(row["defense"], 1.0))
    ranked = sorted(made, key=lambda name: left[name])
    grid: dict[str, tuple[Any, ...]] = {}
    for name in dict.fromkeys([ranked[0], ranked[-1]]):
        attack = named_attack("eot_pgd", made[name], request.size["gradients"])
        options = {"eps": request.radius, "norm": request.norm, "seed": request.seed}
        x_adv = attack(made[name], x, y, **options)
        answers = [predict(made[name], each, request.num_samples, seed=request.seed) for each in (x, x_adv)]
        grid[f"{name} under EOT-PGD"] = (x, x_adv, y, *answers)
    return grid


def write(result: Result, folder: Path) -> list[str]:
    """Writes everything into `folder`, or nothing, and names the files; other files there stay.

    Raises:
        OSError: the folder cannot be written, or has no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with together(folder) as place, steady():
        _write(result, place)
        written = [name for name in FILES if (place / name).exists()]
    for name in set(FILES) - {*written}:
        (folder / name).unlink(missing_ok=True)
    return written


def _write(result: Result, folder: Path) -> None:
    from probdefense import analysis
    from probdefense.analysis.sections import ranked

    report = result.report
    report.save(folder)
    figure = analysis.accuracy_chart(ranked(report)).figure
    figure.savefig(folder / "robustness.png", format="png", dpi=150, bbox_inches="tight")
    analysis.write_html(
        report,
        folder,
        images=result.images,
        checks=result.checks,
        certificate={name: certified(result, name) for name in result.certificates},
        comparison=result.comparison,
    )
    random = [name for name, made in result.made.items() if isinstance(made, Defense) and made.stochastic]
    if random:
        name = "adv_bnn" if "adv_bnn" in random else random[-1]
        x, y = (part[:ARVIZ_IMAGES] for part in result.test)
        tree = analysis.to_arviz(result.made[name], (x, y))
        reserve(folder, ROOM)
        tree.to_netcdf(str(folder / "posterior.nc"))


def certified(result: Result, name: str) -> list[Row]:
    """Certified accuracy at radii up to what the votes of a defense could certify."""
    certificate = result.certificates[name]
    radii = [step * certificate.sigma for step in (0.0, 0.5, 1.0, 1.5, 2.0)]
    return certificate.curve(result.test[1][: len(certificate.label)], radii)


def catalog(recipes: Sequence[Path] = ()) -> dict[str, dict[str, str]]:
    """What there is, by kind and name, with one line each; with the recipes of these files."""
    plugins.found(recipes)
    public = {name: getattr(attacks, name) for name in attacks.__all__}
    lines = {
        "defenses": {name: recipe.about for name, recipe in RECIPES.items()},
        "objectives": {n: _first_line(f) for n, f in vars(objectives).items() if inspect.isfunction(f)},
        "attacks": {name: _first_line(function) for name, function in public.items()},
        "data": {name: source.about for name, source in datasets.SOURCES.items()},
    }
    lines["attacks"]["eot_pgd"] = "pgd on the mean over 16 draws, as many gradients as pgd on one draw."
    return lines


def _first_line(function: Any) -> str:
    """The first line of a docstring, without its formula."""
    line = inspect.cleandoc(function.__doc__ or "").partition("\n")[0]
    return re.sub(r"(, from|,)?\s*\$[^$]*\$", "", line)
