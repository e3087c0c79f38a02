"""The main job: train the defenses asked for, attack each, write the report. The command's engine."""

import importlib.metadata
import inspect
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import probdefense
from probdefense import attacks, checks, objectives
from probdefense import data as datasets
from probdefense.checks import Checks
from probdefense.core.defense import Defense
from probdefense.data import Split
from probdefense.evaluation.certification import Certificate, certify
from probdefense.evaluation.comparison import Comparison, compare_all
from probdefense.evaluation.examples import gather
from probdefense.evaluation.protocol import evaluate
from probdefense.evaluation.report import Report, Row
from probdefense.files import reserve, together
from probdefense.prediction.drawing import is_adaptive
from probdefense.rng import derive
from probdefense.study.opponents import Opponent, attack_names, named_attack
from probdefense.study.recipes import RECIPES, Workshop
from probdefense.types import Attack, Inputs, Labels
from probdefense.validation import check_count, check_member

FULL = {"epochs": 28, "gradients": 128, "images": 1000, "checked": 100, "check_gradients": 32, "votes": 500}
QUICK = {"epochs": 4, "gradients": 32, "images": 100, "checked": 100, "check_gradients": 24, "votes": 100}

CHECK_SAMPLES, CHECK_VERDICT = 4, 20
"""Draws per step and verdict draws of each of the about twenty attacks that check a defense."""

ADAPTIVE_IMAGES = 50
"""Images for a defense that adapts: every answer costs a training, and every attack simulates many."""

ADAPTIVE = "adaptive"
"""The name of the attack that each recipe brings along."""

ARVIZ_IMAGES = 100
"""Images whose predictions go into the ArviZ file."""

GRID_IMAGES = 6
"""Images that the report shows."""

FILES = ("report.json", "timing.json", "arrays.npz", "robustness.png", "report.html", "posterior.nc")
"""What a run writes; the last of them if a defense is random."""

ROOM = 2**25
"""Bytes that must be free: the files are a few million, and HDF5 dies on a full disk."""


@dataclass(frozen=True)
class Request:
    """What is asked for; None means the default of the data set or of ``quick``."""

    defenses: tuple[str, ...]
    attacks: tuple[str, ...]
    data: str = "digits"
    eps: float | None = None
    num_samples: int = 50
    epochs: int | None = None
    seed: int = 0
    quick: bool = False
    data_root: Path | None = None

    @property
    def size(self) -> dict[str, int]:
        """Epochs, gradients per image and attack, and test images."""
        size = QUICK if self.quick else FULL
        if self.data != "digits":
            size = {**size, "epochs": max(1, size["epochs"] // 6)}
        return size if self.epochs is None else {**size, "epochs": self.epochs}

    @property
    def radius(self) -> float:
        """The l-inf radius in pixels."""
        return datasets.SOURCES[self.data].eps if self.eps is None else self.eps


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
        images: Clean and attacked images by caption.
    """

    report: Report
    made: dict[str, Any]
    test: tuple[Inputs, Labels]
    comparison: Comparison | None
    checks: dict[str, Checks]
    certificates: dict[str, Certificate]
    images: dict[str, tuple[Inputs, Inputs]]


def prepare(request: Request) -> tuple[Request, Split]:
    """Refuses what cannot be done, before any work, and loads the data.

    Raises:
        ValueError: an unknown name or a number out of range.
        FileNotFoundError: data that are not there.
    """
    wanted = request.attacks
    if not request.defenses:
        raise ValueError(f"expected at least one defense; known: {', '.join(RECIPES)}, all")
    for name in request.defenses:
        check_member("defense", name, [*RECIPES, "all"])
    if "all" in request.defenses:
        wanted = tuple(dict.fromkeys((*wanted, ADAPTIVE)))
    each = [name for asked in request.defenses for name in (RECIPES if asked == "all" else [asked])]
    names = tuple(dict.fromkeys(each))
    for name in request.attacks:
        check_member("attack", name, ["clean", ADAPTIVE, *attack_names()])
    check_member("data set", request.data, datasets.SOURCES)
    _check_radius(request.radius)
    check_count("--num-samples", request.num_samples)
    check_count("--seed", request.seed, least=0)
    if request.epochs is not None:
        check_count("--epochs", request.epochs)
    return replace(request, defenses=names, attacks=wanted), datasets.load(request.data, request.data_root)


def _check_radius(eps: Any) -> None:
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps <= 1:
        raise ValueError(
            f"expected --eps in (0, 1], the l-inf radius in pixels, got {eps}; 8 of 255 gray levels are "
            "0.0314, and clean accuracy is always in the report"
        )


def run(request: Request, data: Split, say: Callable[[str], None] = lambda line: None) -> Result:
    """Trains, attacks and checks every defense; `say` gets one line per step."""
    x, y = (part[: request.size["images"]] for part in gather(data.test))
    shop = Workshop(data, request.radius, request.size["epochs"], request.seed)
    reports: list[Report] = []
    found: dict[str, Checks] = {}
    certificates: dict[str, Certificate] = {}
    seconds = {}
    for number, name in enumerate(request.defenses, 1):
        say(f"[{number}/{len(request.defenses)}] {name}: {RECIPES[name].about}")
        start = time.perf_counter()
        defense = shop.make(name)
        seconds[f"{name}/training"] = time.perf_counter() - start
        reports += _evaluated(request, name, defense, (x, y))
        if is_adaptive(defense):
            continue
        found[name] = _checked(request, defense, (x, y))
        if getattr(defense, "input_noise", None) is not None:
            certificates[name] = _certified(request, defense, x)
    total = sum(reports[1:], reports[0])
    total.timing = {**seconds, **total.timing}
    total.settings = {**_settings(request, len(y)), **total.settings}
    made = {name: shop.made[name] for name in request.defenses}
    grid = _grid(request, made, (x[:GRID_IMAGES], y[:GRID_IMAGES]))
    return Result(total, made, (x, y), _compared(total), found, certificates, grid)


def use_one_thread() -> None:
    """On a hundred 8x8 images threads only wait for each other; ``OMP_NUM_THREADS`` says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _evaluated(request: Request, name: str, defense: Any, test: tuple[Inputs, Labels]) -> list[Report]:
    """The report of one defense; of one that adapts, its static base on the same images beside it."""
    if not is_adaptive(defense):
        return [_evaluate(request, name, defense, test, RECIPES[name].opponent)]
    x, y = (part[:ADAPTIVE_IMAGES] for part in test)
    base = _evaluate(request, f"{name}_static", defense.static, (x, y), named_pgd)
    return [base, _evaluate(request, name, defense, (x, y), RECIPES[name].opponent)]


def named_pgd(defense: Any, gradients: int) -> Attack:
    """PGD, which is what judges the base of a defense that adapts."""
    return named_attack("pgd", defense, gradients)


def _evaluate(
    request: Request, name: str, defense: Any, test: tuple[Inputs, Labels], opponent: Opponent
) -> Report:
    gradients = request.size["gradients"]
    wanted = [attack for attack in request.attacks if attack != "clean"]
    report = evaluate(
        defense,
        test,
        {
            attack: opponent(defense, gradients)
            if attack == ADAPTIVE
            else named_attack(attack, defense, gradients)
            for attack in wanted
        },
        norm=math.inf,
        eps=request.radius,
        num_samples=request.num_samples,
        seed=request.seed,
        name=name,
    )
    notes = RECIPES[name].notes if name in RECIPES else {}
    report.rows = [{**row, **notes} for row in report.rows]
    return report


def _checked(request: Request, defense: Any, test: tuple[Inputs, Labels]) -> Checks:
    x, y = (part[: request.size["checked"]] for part in test)
    return checks.run(
        defense,
        x,
        y,
        eps=request.radius,
        num_gradients=request.size["check_gradients"],
        num_samples=CHECK_SAMPLES,
        num_verdict=CHECK_VERDICT,
        seed=request.seed,
    )


def _certified(request: Request, defense: Defense, x: Inputs) -> Certificate:
    seed = derive(request.seed, "certificate")
    return certify(defense, x[: request.size["checked"]], n=request.size["votes"], seed=seed)


def _compared(report: Report) -> Comparison | None:
    """Every pair of defenses that saw the same images, adjusted among those."""
    rows: list[Row] = []
    for count in dict.fromkeys(row["num_examples"] for row in report.rows):
        kept = [report.only(name) for name in report.defenses if _seen(report, name) == count]
        if len(kept) > 1:
            rows += compare_all(sum(kept[1:], kept[0]), rule="mean_prob").rows
    return Comparison(rows, 1) if rows else None


def _seen(report: Report, name: str) -> int:
    """How many images a defense was judged on."""
    return len(report.arrays.at("labels", name))


def _grid(
    request: Request, made: dict[str, Any], test: tuple[Inputs, Labels]
) -> dict[str, tuple[Inputs, Inputs]]:
    """A few images under PGD on the first and the last defense."""
    x, y = test
    grid = {}
    for name in dict.fromkeys([next(iter(made)), list(made)[-1]]):
        attack = named_attack("eot_pgd", made[name], request.size["gradients"])
        grid[f"{name} under EOT-PGD"] = (x, attack(made[name], x, y, eps=request.radius, seed=request.seed))
    return grid


def _settings(request: Request, num_examples: int) -> dict[str, Any]:
    asked = asdict(request)
    del asked["data_root"]
    asked |= {"eps": request.radius, "num_examples": num_examples, **request.size}
    return {"versions": versions(), **asked}


def write(result: Result, folder: Path) -> list[str]:
    """Writes everything into `folder`, or nothing, and names the files; other files there stay.

    Raises:
        OSError: the folder cannot be written, or has no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with together(folder) as place:
        _write(result, place)
        written = [name for name in FILES if (place / name).exists()]
    for name in set(FILES) - {*written}:
        (folder / name).unlink(missing_ok=True)
    return written


def _write(result: Result, folder: Path) -> None:
    from probdefense import analysis

    report = result.report
    report.save(folder)
    figure = analysis.accuracy_chart(report).figure
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


def versions() -> dict[str, str]:
    """The versions of probdefense and what it stands on."""
    found = {"probdefense": probdefense.__version__}
    for name in ("torch", "pyro-ppl", "numpyro", "arviz"):
        found[name] = importlib.metadata.version(name)
    return found


def catalog() -> dict[str, dict[str, str]]:
    """What there is, by kind and name, with one line each."""
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
