"""What is asked of the main job, and what of it cannot be done."""

import importlib.metadata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import probdefense
from probdefense import data as datasets
from probdefense.data import Split
from probdefense.study import plugins
from probdefense.study.opponents import attack_names, suite_budget
from probdefense.study.recipes import BATCH, DECAY, INNER_STEPS, RECIPES, VALIDATION, WARM_UP, learning_rates
from probdefense.validation import check_count, check_member

FULL = {
    "epochs": 46,
    "gradients": 128,
    "images": 1000,
    "adaptive_images": 50,
    "checked": 100,
    "check_gradients": 32,
    "votes": 500,
}
"""The budget: a compromise that ends in two minutes on two cores. Every row of a report has the same.

A defense that adapts sees fewer images: every answer costs a training, every attack simulates many."""

QUICK = {**FULL, "epochs": 4, "gradients": 32, "images": 100, "check_gradients": 24, "votes": 100}

ADAPTIVE = "adaptive"
"""The name of the attack that each recipe brings along."""

JUDGE = "suite"
"""The attack that no defense is judged without, once it is attacked at all."""


@dataclass(frozen=True)
class Request:
    """What is asked for; None means the default of the data set or of ``quick``.

    ``size`` is filled by `prepare`: epochs, gradients per image and attack, test images, and so on.
    ``recipes`` are files with recipes of one's own.
    """

    defenses: tuple[str, ...]
    attacks: tuple[str, ...]
    data: str = "digits"
    eps: float | None = None
    num_samples: int = 50
    epochs: int | None = None
    seed: int = 0
    quick: bool = False
    data_root: Path | None = None
    size: Mapping[str, int] = field(default_factory=dict)
    recipes: tuple[Path, ...] = ()

    @property
    def radius(self) -> float:
        """The l-inf radius in pixels."""
        return datasets.SOURCES[self.data].eps if self.eps is None else self.eps

    @property
    def families(self) -> list[tuple[str, ...]]:
        """Defenses that share a training, the longest first."""
        found: dict[str, list[str]] = {}
        for name in self.defenses:
            found.setdefault(RECIPES[name].base or name, []).append(name)
        cost = {root: RECIPES[root].cost + len(names) for root, names in found.items()}
        return [tuple(found[root]) for root in sorted(found, key=lambda root: -cost[root])]


def prepare(request: Request) -> tuple[Request, Split]:
    """Refuses what cannot be done, before any work, and loads the data.

    Whatever attacks are named, the suite is one of them.

    Raises:
        ValueError: an unknown name or a number out of range.
        FileNotFoundError: data that are not there.
    """
    with naming("--recipes"):
        plugins.found(request.recipes)
    with naming("--defenses"):
        if not request.defenses:
            raise ValueError(f"expected at least one defense; known: {', '.join(RECIPES)}, all")
        for name in request.defenses:
            check_member("defense", name, [*RECIPES, "all"])
    each = [name for asked in request.defenses for name in (RECIPES if asked == "all" else [asked])]
    with naming("--attacks"):
        for name in request.attacks:
            check_member("attack", name, ["clean", ADAPTIVE, *attack_names()])
    with naming("--data"):
        check_member("data set", request.data, datasets.SOURCES)
    _check_radius(request.radius)
    check_count("--num-samples", request.num_samples)
    check_count("--seed", request.seed, least=0)
    if request.epochs is not None:
        check_count("--epochs", request.epochs)
    wanted = replace(
        request, defenses=tuple(dict.fromkeys(each)), attacks=_attacks(request), size=_size(request)
    )
    with naming("--data"):
        return wanted, datasets.load(request.data, request.data_root)


@contextmanager
def naming(option: str) -> Iterator[None]:
    """Inside, what is refused says which option it came from."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        kind = type(error) if type(error) in (TypeError, ImportError, FileNotFoundError) else ValueError
        raise kind(f"{option}: {error}") from error


def _attacks(request: Request) -> tuple[str, ...]:
    wanted = list(request.attacks)
    if {*wanted} - {"clean"} or "all" in request.defenses:
        wanted.append(JUDGE)
    if "all" in request.defenses:
        wanted.append(ADAPTIVE)
    return tuple(dict.fromkeys(wanted))


def _size(request: Request) -> dict[str, int]:
    size = QUICK if request.quick else FULL
    epochs = size["epochs"] if request.data == "digits" else max(1, size["epochs"] // 9)
    return {**size, "epochs": epochs if request.epochs is None else request.epochs}


def _check_radius(eps: Any) -> None:
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps <= 1:
        raise ValueError(
            f"expected --eps in (0, 1], the l-inf radius in pixels, got {eps}; 8 of 255 gray levels are "
            "0.0314, and clean accuracy is always in the report"
        )


def settings(request: Request, num_examples: int) -> dict[str, Any]:
    """What the numbers of a report depend on."""
    asked = {
        name: getattr(request, name)
        for name in ("defenses", "attacks", "data", "num_samples", "epochs", "seed", "quick")
    }
    asked |= {"eps": request.radius, "num_examples": num_examples, **request.size}
    return {
        "versions": versions(),
        **asked,
        "suite_budget": suite_budget(request.size["gradients"]),
        "training": training(request),
    }


def training(request: Request) -> dict[str, Any]:
    """How every recipe was trained."""
    return {
        "learning_rate": _rates(request),
        "schedule": "cosine",
        "optimizer": "Adam",
        "batch_size": BATCH,
        "weight_average": f"ema {DECAY:g}",
        "warm_up_epochs": round(WARM_UP * request.size["epochs"], 2),
        "inner_attack": f"PGD-{INNER_STEPS}, steps of 2.5 eps / {INNER_STEPS}",
        "validation": VALIDATION
        if request.data == "digits"
        else "none: the rate was not tuned on these data",
    }


def _rates(request: Request) -> dict[str, float]:
    """By recipe, of those that train: the defenses and what they go on from."""
    names = dict.fromkeys(each for name in request.defenses for each in (RECIPES[name].base, name) if each)
    rates = learning_rates(request.data)
    return {name: rates[name] for name in names if name in rates}


def versions() -> dict[str, str]:
    """The versions of probdefense and what it stands on."""
    found = {"probdefense": probdefense.__version__}
    for name in ("torch", "pyro-ppl", "numpyro", "arviz"):
        found[name] = importlib.metadata.version(name)
    return found
