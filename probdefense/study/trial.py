"""One family of defenses: trained, attacked, checked and certified."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import Subset

from probdefense import checks
from probdefense.checks import Checks
from probdefense.core.defense import Defense
from probdefense.data import Split
from probdefense.data.scripts import FILES
from probdefense.evaluation.certification import Certificate, certify
from probdefense.evaluation.examples import gather
from probdefense.evaluation.protocol import evaluate
from probdefense.evaluation.report import Report
from probdefense.prediction.drawing import is_adaptive
from probdefense.rng import derive, forked
from probdefense.study.fabric import device_of
from probdefense.study.opponents import Opponent, named_attack, own_attack
from probdefense.study.recipes import Workshop
from probdefense.study.request import ADAPTIVE, Request, rates, settings
from probdefense.study.store import Found, keep, kept
from probdefense.types import Attack, Inputs, Labels

CHECK_SAMPLES, CHECK_VERDICT = 4, 20
"""Draws per step and verdict draws of each of the about twenty attacks that check a defense."""

STEPS = 4
"""How often a defense tells of its progress."""


def _nothing() -> None:
    """Does nothing."""


class Family(NamedTuple):
    """Defenses that share a training, and all that their trial needs.

    Attributes:
        names: The defenses.
        request: What is asked.
        data: Training and test set.
        say: Gets one line per defense as it starts.
        folder: Where each is kept once it is finished; None for nowhere.
        resume: Whether those that were finished before are taken from there.
        fabric: The processes that do it together.
        step: Called four times per defense.
    """

    names: tuple[str, ...]
    request: Request
    data: Split
    say: Callable[[str], None]
    folder: Path | None = None
    resume: bool = False
    fabric: Any = None
    step: Callable[[], None] = _nothing


def judged(family: Family) -> dict[str, Found]:
    """Every defense of a family by name; what they share is trained once."""
    request, data = family.request, family.data
    device = device_of(request.device) if family.fabric is None else family.fabric.device
    shop = Workshop(
        data,
        request.radius,
        request.size["epochs"],
        request.seed,
        rates(request),
        plan=request.plan,
        variants=request.variants,
        norm=request.norm,
        fabric=family.fabric,
        device=device,
        attacked_epochs=request.plan.attacked_epochs,
    )
    test = tuple(part.to(device) for part in tested(request, data))
    found = {name: _found(family, name, shop, (test[0], test[1])) for name in family.names}
    return {name: each._replace(defense=_home(each.defense)) for name, each in found.items()}


def _home(defense: Any) -> Any:
    """A defense where its report is made, which is no GPU."""
    return defense.cpu() if isinstance(defense, nn.Module) else defense


def _found(family: Family, name: str, shop: Workshop, test: tuple[Inputs, Labels]) -> Found:
    """One defense: judged, or taken from where it was finished before."""
    request = family.request
    number = f"[{request.defenses.index(name) + 1}/{len(request.defenses)}]"
    seed = f", seed {request.seed}" if request.seeds else ""
    known = about(request, name, len(test[1]))
    before = None
    if family.resume and family.folder is not None:
        with forked(0):
            before = kept(family.folder, name, known, shop.net)
    if before is not None:
        family.say(f"{number} {name}{seed}: finished before")
        defense = before.defense
        if defense is not None:
            shop.made[name] = defense if shop.device is None else defense.to(shop.device)
        for _ in range(STEPS):
            family.step()
        return before._replace(defense=shop.make(name))
    family.say(f"{number} {name}{seed}: {request.recipe(name).about}")
    found = _judged(family, name, shop, test)
    if family.folder is not None and (family.fabric is None or family.fabric.is_global_zero):
        try:
            keep(family.folder, name, found, known)
        except OSError as error:  # the numbers are worth more
            family.say(f"{number} {name}{seed} is not kept: {error.strerror or error}")
    return found


def about(request: Request, name: str, num_examples: int) -> dict[str, Any]:
    """What the numbers of one defense depend on, files of the user's included."""
    mine = (name, request.recipe(name).base)
    variants = {each: variant for each, variant in request.variants.items() if each in mine}
    files = {module: hashlib.sha256(path.read_bytes()).hexdigest() for module, path in FILES.items()}
    asked = replace(request, defenses=(name,), seeds=(), variants=variants)
    return {**settings(asked, num_examples), "files": files}


def tested(request: Request, data: Split) -> tuple[Inputs, Labels]:
    """The images that are attacked."""
    count = min(request.size["images"], len(data.test))
    return gather(Subset(data.test, range(count)))


def _judged(family: Family, name: str, shop: Workshop, test: tuple[Inputs, Labels]) -> Found:
    start = time.perf_counter()
    defense = shop.make(name)
    seconds = time.perf_counter() - start
    family.step()
    family.step()
    reports = _evaluated(family, name, defense, test)
    family.step()
    checks = certificate = None
    if not is_adaptive(defense):
        noisy = getattr(defense, "input_noise", None) is not None
        certificate = _certified(family, defense, test[0]) if noisy else None
        checks = _checked(family.request, defense, test)
    family.step()
    return Found(defense, reports, seconds, checks, certificate)


def _evaluated(family: Family, name: str, defense: Any, test: tuple[Inputs, Labels]) -> list[Report]:
    """The report of one defense; of one that adapts, its static base on the same images beside it."""
    opponent = family.request.recipe(name).opponent
    if not is_adaptive(defense):
        return [_evaluate(family, name, defense, test, opponent)]
    x, y = (part[: family.request.size["adaptive_images"]] for part in test)
    base = _evaluate(family, f"{name}_static", defense.static, (x, y), named_pgd)
    return [base, _evaluate(family, name, defense, (x, y), opponent)]


def named_pgd(defense: Any, gradients: int) -> Attack:
    """PGD, which is what judges the base of a defense that adapts."""
    return named_attack("pgd", defense, gradients)


def _evaluate(
    family: Family, name: str, defense: Any, test: tuple[Inputs, Labels], opponent: Opponent
) -> Report:
    request, gradients = family.request, family.request.size["gradients"]
    shots = {name: request.shot(name) for name in request.attacks if name != "clean"}
    report = evaluate(
        defense,
        test,
        {
            attack: opponent(defense, gradients)
            if shot.of == ADAPTIVE
            else own_attack(shot.of, shot.arguments, defense, gradients, request.norm)
            for attack, shot in shots.items()
        },
        norm=request.norm,
        eps=request.radius,
        num_samples=request.num_samples,
        seed=request.seed,
        name=name,
        fabric=family.fabric,
    )
    known = name in request.defenses
    notes = request.recipe(name).notes(**request.variant(name).arguments) if known else {}
    report.rows = [{**row, **notes} for row in report.rows]
    return report


def _checked(request: Request, defense: Any, test: tuple[Inputs, Labels]) -> Checks:
    x, y = (part[: request.size["checked"]] for part in test)
    return checks.run(
        defense,
        x,
        y,
        eps=request.radius,
        norm=request.norm,
        num_gradients=request.size["check_gradients"],
        num_samples=CHECK_SAMPLES,
        num_verdict=CHECK_VERDICT,
        seed=request.seed,
    )


def _certified(family: Family, defense: Defense, x: Inputs) -> Certificate:
    request = family.request
    seed = derive(request.seed, "certificate")
    images = x[: request.size["checked"]]
    found = certify(defense, images, n=request.size["votes"], seed=seed, fabric=family.fabric)
    tensors = {n: value.cpu() for n, value in vars(found).items() if isinstance(value, torch.Tensor)}
    return replace(found, **tensors)  # type: ignore[arg-type]
