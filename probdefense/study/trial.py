"""One family of defenses: trained, attacked, checked and certified."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from probdefense import checks
from probdefense.checks import Checks
from probdefense.core.defense import Defense
from probdefense.data import Split
from probdefense.evaluation.certification import Certificate, certify
from probdefense.evaluation.examples import gather
from probdefense.evaluation.protocol import evaluate
from probdefense.evaluation.report import Report
from probdefense.prediction.drawing import is_adaptive
from probdefense.rng import derive
from probdefense.study.opponents import Opponent, named_attack
from probdefense.study.recipes import RECIPES, Workshop, learning_rates
from probdefense.study.request import ADAPTIVE, Request
from probdefense.types import Attack, Inputs, Labels

CHECK_SAMPLES, CHECK_VERDICT = 4, 20
"""Draws per step and verdict draws of each of the about twenty attacks that check a defense."""


class Family(NamedTuple):
    """Defenses that share a training, and all that their trial needs."""

    names: tuple[str, ...]
    request: Request
    data: Split
    say: Callable[[str], None]


class Found(NamedTuple):
    """What one defense is and was found to keep."""

    defense: Any
    reports: list[Report]
    seconds: float
    checks: Checks | None
    certificate: Certificate | None


def judged(family: Family) -> dict[str, Found]:
    """Every defense of a family by name; what they share is trained once."""
    request, data = family.request, family.data
    rates = learning_rates(request.data)
    shop = Workshop(data, request.radius, request.size["epochs"], request.seed, rates)
    found = {}
    for name in family.names:
        place = f"{request.defenses.index(name) + 1}/{len(request.defenses)}"
        family.say(f"[{place}] {name}: {RECIPES[name].about}")
        found[name] = _judged(request, name, shop, tested(request, data))
    return found


def tested(request: Request, data: Split) -> tuple[Inputs, Labels]:
    """The images that are attacked."""
    x, y = gather(data.test)
    return x[: request.size["images"]], y[: request.size["images"]]


def _judged(request: Request, name: str, shop: Workshop, test: tuple[Inputs, Labels]) -> Found:
    start = time.perf_counter()
    defense = shop.make(name)
    seconds = time.perf_counter() - start
    reports = _evaluated(request, name, defense, test)
    if is_adaptive(defense):
        return Found(defense, reports, seconds, None, None)
    noisy = getattr(defense, "input_noise", None) is not None
    certificate = _certified(request, defense, test[0]) if noisy else None
    return Found(defense, reports, seconds, _checked(request, defense, test), certificate)


def _evaluated(request: Request, name: str, defense: Any, test: tuple[Inputs, Labels]) -> list[Report]:
    """The report of one defense; of one that adapts, its static base on the same images beside it."""
    if not is_adaptive(defense):
        return [_evaluate(request, name, defense, test, RECIPES[name].opponent)]
    x, y = (part[: request.size["adaptive_images"]] for part in test)
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
    notes = RECIPES[name].notes() if name in RECIPES else {}
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
