"""What is asked of the main job, and what of it cannot be done."""

import importlib.metadata
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Subset, TensorDataset

import probdefense
from probdefense import data as datasets
from probdefense.data import Split
from probdefense.evaluation.examples import gather
from probdefense.study import plugins
from probdefense.study.fabric import device_of
from probdefense.study.nets import Facts, check_net, facts_of
from probdefense.study.opponents import check_budget, check_settings, suite_budget
from probdefense.study.plans import Plan, plan_for
from probdefense.study.recipes import RECIPES, VALIDATION, Rehearsal, Variant
from probdefense.types import Inputs, Norm
from probdefense.validation import check_count, check_examples, check_member

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

OURS = "probdefense."
"""Where our recipes are; those of others are made once more, without training, before the work."""


@dataclass(frozen=True)
class Request:
    """What is asked for; None means the default of the data set or of ``quick``.

    ``size`` is filled by `prepare`: epochs, gradients per image and attack, test images, and so on;
    ``sizes`` is what of it was asked for, ``training`` what of the plan.
    ``recipes`` are files with recipes of one's own; ``variants`` and ``shots`` recipes and attacks with
    arguments of their own, by the names that ``defenses`` and ``attacks`` call them.
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
    net: str | None = None
    seeds: tuple[int, ...] = ()
    device: str = "cpu"
    norm: Norm = math.inf
    sizes: Mapping[str, int] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Variant] = field(default_factory=dict)
    shots: Mapping[str, Variant] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """How every defense is trained."""
        asked = {**self.training, **({} if self.net is None else {"net": self.net})}
        if self.epochs is not None:
            asked |= {"epochs": self.epochs, "attacked_epochs": self.epochs}
        for name in ("epochs", "learning_rate"):
            if name in asked:
                asked.setdefault(f"attacked_{name}", asked[name])
        plan = replace(plan_for(self.data, self.quick, QUICK["epochs"]), **asked)
        for name in ("epochs", "learning_rate"):  # said once if it is the same
            if getattr(plan, f"attacked_{name}") == getattr(plan, name):
                same: dict[str, Any] = {f"attacked_{name}": None}
                plan = replace(plan, **same)
        return plan

    @property
    def radius(self) -> float:
        """The radius in pixels."""
        return datasets.SOURCES[self.data].eps if self.eps is None else self.eps

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of the trainings."""
        return self.seeds or (self.seed,)

    @property
    def families(self) -> list[tuple[str, ...]]:
        """Defenses that share a training, the longest first."""
        found: dict[str, list[str]] = {}
        for name in self.defenses:
            found.setdefault(self.recipe(name).base or name, []).append(name)
        cost = {root: self.recipe(root).cost + len(names) for root, names in found.items()}
        return [tuple(found[root]) for root in sorted(found, key=lambda root: -cost[root])]

    def variant(self, name: str) -> Variant:
        """The recipe of a row, and its arguments."""
        return self.variants.get(name, Variant(name, {}))

    def shot(self, name: str) -> Variant:
        """The attack of a column, and its settings."""
        return self.shots.get(name, Variant(name, {}))

    def recipe(self, name: str) -> Any:
        """The recipe of a row."""
        return RECIPES[self.variant(name).of]


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
        each = _defenses(request)
    request = _named_shots(request)
    with naming("--attacks"):
        for name in request.attacks:
            shot = request.shot(name)
            check_settings(shot.of, shot.arguments)
    with naming("--data"):
        if not isinstance(request.data, str) or not _own(request.data):
            check_member("data set", request.data, [*datasets.SOURCES, "folder:PATH", "your FILE.py:NAME"])
    with naming("--device"):
        device_of(request.device)
    _check_numbers(request)
    budget = QUICK if request.quick else FULL
    size = {**budget, **request.sizes, "epochs": request.plan.epochs}
    wanted = replace(request, defenses=each, attacks=_attacks(request), size=size)
    with naming("--data"):
        split = _limited(datasets.load(request.data, request.data_root), wanted.plan.images)
        facts = facts_of(split.train)
        _check_split(split, facts, wanted.size["images"])
    with naming("--net"):
        check_net(wanted.plan.net, facts)
    with naming("--study"):
        rehearsed = _rehearse(wanted, split)
    with naming("--attacks"):
        _check_budgets(wanted, rehearsed, gather(Subset(split.test, [0]))[0])
    return wanted, split


def _rehearse(request: Request, data: Split) -> dict[str, Any]:
    """Makes, without training, what has arguments of its own, and what the suite may not have the budget for.

    Of our recipes none needs more than the budget that the suite has by default.
    """
    shop = Rehearsal(data, request.radius, 1, plan=request.plan, variants=request.variants)
    shots = [request.shot(name) for name in request.attacks]
    asked = any("budget" in shot.arguments for shot in shots if shot.of == JUDGE)
    for name in request.defenses:
        if request.variant(name).arguments or asked:
            shop.make(name)
        elif JUDGE in request.attacks and not request.recipe(name).make.__module__.startswith(OURS):
            with suppress(Exception):  # what is wrong with it shows when it runs
                shop.make(name)
    return shop.made


def _check_budgets(request: Request, made: Mapping[str, Any], x: Inputs) -> None:
    """Refuses suites that could not start on what has been made without training."""
    for shot in map(request.shot, request.attacks):
        for name, defense in made.items():
            gradients = request.size["gradients"]
            check_budget(shot.of, shot.arguments, name, defense, x, gradients=gradients, norm=request.norm)


@contextmanager
def naming(option: str) -> Iterator[None]:
    """Inside, what is refused says which option it came from."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        kind = type(error) if type(error) in (TypeError, ImportError, FileNotFoundError) else ValueError
        raise kind(f"{option}: {error}") from error


def _own(data: str) -> bool:
    """Whether a data set is the user's, and not one of ours."""
    return data.startswith("folder:") or ".py:" in data


def _defenses(request: Request) -> tuple[str, ...]:
    """The rows asked for, each once."""
    if not request.defenses:
        raise ValueError(f"expected at least one defense; known: {', '.join(RECIPES)}, all")
    for name in request.defenses:
        check_member("defense", request.variant(name).of, [*RECIPES, "all"])
    each = [name for asked in request.defenses for name in (RECIPES if asked == "all" else [asked])]
    return tuple(dict.fromkeys(each))


def _attacks(request: Request) -> tuple[str, ...]:
    wanted = list(request.attacks)
    if {*wanted} - {"clean"} or "all" in request.defenses:
        wanted.append(JUDGE)
    if "all" in request.defenses:
        wanted.append(ADAPTIVE)
    return tuple(dict.fromkeys(wanted))


def _check_numbers(request: Request) -> None:
    if request.eps is None and (request.data not in datasets.SOURCES or request.norm != math.inf):
        raise ValueError(
            "expected --eps, the radius in pixels, got none; only the data sets that come by name have a "
            "usual one, for the norm inf"
        )
    _check_radius(request.radius, request.norm)
    check_count("--num-samples", request.num_samples)
    check_count("--seed", request.seed, least=0)
    for seed in request.seeds:
        check_count("--seeds", seed, least=0)
    if len({*request.seeds}) < len(request.seeds):
        raise ValueError(f"expected --seeds that differ, got {', '.join(map(str, request.seeds))}")
    if request.epochs is not None:
        check_count("--epochs", request.epochs)


def _check_radius(eps: Any, norm: Norm) -> None:
    number = not isinstance(eps, bool) and isinstance(eps, int | float)
    if not number or not 0 < eps <= (1 if norm == math.inf else 1e6):
        raise ValueError(
            f"expected --eps in (0, 1], the l-inf radius in pixels, got {eps}; 8 of 255 gray levels are "
            "0.0314, and clean accuracy is always in the report"
        )


def _named_shots(request: Request) -> Request:
    """The request whose attacks of files are called by their names alone."""
    own = {name.rpartition(":")[2]: Variant(name, {}) for name in request.attacks if ".py:" in name}
    names = tuple(name.rpartition(":")[2] if ".py:" in name else name for name in request.attacks)
    return replace(request, attacks=names, shots={**request.shots, **own})


def _limited(data: Split, images: int | None) -> Split:
    """The data with so many training images."""
    if images is None or images >= len(data.train):
        return data
    if hasattr(data.train, "tensors"):
        return Split(TensorDataset(*(part[:images] for part in data.train.tensors)), data.test)
    train: Any = Subset(data.train, range(images))
    if hasattr(data.train, "classes"):
        train.classes = data.train.classes
    return Split(train, data.test)


def _check_split(data: Split, facts: Facts, images: int) -> None:
    """Refuses test images, and the first of those for training, that do not fit together."""
    if facts.classes < 2:
        raise ValueError("expected training images of at least two classes, got one; look at the labels")
    for name, part, count in (("training", data.train, 100), ("test", data.test, images)):
        if not len(part):
            raise ValueError(f"expected {name} images, got none; give other data")
        x, y = check_examples(gather(Subset(part, range(min(count, len(part))))), f"the {name} data")
        if tuple(x.shape[1:]) != facts.shape or int(y.max()) >= facts.classes:
            raise ValueError(
                f"expected {name} images of shape {facts.shape} and labels below {facts.classes}, as in the "
                f"training set, got {tuple(x.shape[1:])} and {int(y.max())}; look at the data"
            )


def settings(request: Request, num_examples: int) -> dict[str, Any]:
    """What the numbers of a report depend on."""
    asked = {
        name: getattr(request, name)
        for name in ("defenses", "attacks", "data", "num_samples", "epochs", "seed", "quick")
    }
    asked |= {"eps": request.radius, "num_examples": num_examples, **request.size}
    found = {
        "versions": versions(),
        **asked,
        "suite_budget": suite_budget(request.size["gradients"]),
        "training": training(request),
    }
    for name, given in (("defense_arguments", request.variants), ("attack_arguments", request.shots)):
        if changed := {row: each for row, each in given.items() if each != Variant(row, {})}:
            found[name] = {row: {"of": each.of, **each.arguments} for row, each in changed.items()}
    return found


def training(request: Request) -> dict[str, Any]:
    """How every recipe was trained."""
    plan = request.plan
    kept = {each.name: getattr(plan, each.name) for each in fields(plan)}
    changed = {
        name: kept[name]
        for name in ("net", "attacked_epochs", "crop", "flip", "images")
        if kept[name] != getattr(Plan(), name)
    }
    return {
        "learning_rate": _rates(request),
        "schedule": "cosine",
        "optimizer": "Adam",
        "batch_size": plan.batch_size,
        "weight_average": f"ema {plan.weight_average:g}" if plan.weight_average else "none",
        "warm_up_epochs": round(plan.warm_up * (plan.attacked_epochs or request.size["epochs"]), 2),
        "inner_attack": f"PGD-{plan.inner_steps}, steps of 2.5 eps / {plan.inner_steps}",
        "validation": VALIDATION
        if request.data == "digits"
        else "none: the rate was not tuned on these data",
        **changed,
    }


def rates(request: Request) -> dict[str, float]:
    """Learning rates by recipe, of all that train."""
    plan = request.plan
    return {
        name: plan.rate(recipe.learning_rate, recipe.attacked)
        for name, recipe in RECIPES.items()
        if recipe.learning_rate is not None
    }


def _rates(request: Request) -> dict[str, float]:
    """By row, of those that train: the defenses and what they go on from."""
    found, known = {}, rates(request)
    for name in request.defenses:
        for each in (request.recipe(name).base, name):
            asked = request.variant(each) if each else None
            if asked is not None and asked.of in known:
                found[each] = asked.learning_rate or known[asked.of]
    return found


def versions() -> dict[str, str]:
    """The versions of probdefense and what it stands on."""
    found = {"probdefense": probdefense.__version__}
    for name in ("torch", "pyro-ppl", "numpyro", "arviz"):
        found[name] = importlib.metadata.version(name)
    return found
