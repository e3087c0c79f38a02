"""Checks by attack: what costs the attacker more must never help the defender.

A comparison fires if an attack that should be weaker than the one that is checked leaves significantly
less accuracy, beyond three points. The attack that is checked then gets four times its budget: if that
closes the gap it was too weak, if not, the gradient that it follows misleads. Where the gap shows and the
examples are too few to be sure of it, and where four times the budget alone gets further, the verdict is
"cannot tell": not enough budget.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np

from probdefense.attacks.fgsm import fgsm
from probdefense.attacks.square import NOISY_RIVALS, square
from probdefense.checks.bench import MORE, Bench, beyond, perhaps
from probdefense.checks.results import MORE_BUDGET, Check, doubted, skipped
from probdefense.types import Attack

FEWEST_QUERIES = 3 + NOISY_RIVALS
"""What the square attack needs to take a step on a random defense."""


def comparisons(bench: Bench, gradient_free: Attack | None) -> Iterator[Check]:
    """Every comparison that the defense allows."""
    yield compared(bench, "larger eps", "half the eps", bench.climbed("half eps", eps=bench.eps / 2))
    yield _steps(bench)
    one_step = bench.reached(partial(fgsm, eps=bench.eps, loss=bench.loss))
    yield compared(bench, "one step", "one step", one_step)
    yield from _draws(bench)
    if gradient_free is None and bench.norm == 1:
        yield skipped("gradient-free", "pass gradient_free=: the square attack has no L1 form")
    else:
        yield compared(bench, "gradient-free", "no gradient", _without_gradient(bench, gradient_free))
    yield _unbounded(bench)


def _steps(bench: Bench) -> Check:
    """Half the steps must not be better; where four times the budget is, the budget is not enough."""
    fewer = bench.climbed("half the steps", steps=max(1, bench.steps // 2))
    check = compared(bench, "more steps", "half the steps", fewer)
    if check.verdict != "ok":
        return check
    more = bench.base(MORE)
    evidence = {**check.evidence, f"at {MORE}x the budget": float(more.mean())}
    if not perhaps(bench.base() - more):
        return Check(check.name, "ok", "", evidence)
    why = f"{MORE_BUDGET}: {MORE} times the gradients leave less; raise num_gradients until they do not"
    return doubted(check.name, why, evidence)


def _draws(bench: Bench) -> Iterator[Check]:
    """What draws are worth to the attacker, and what the network without its randomness tells him."""
    if bench.draws == 1:
        for name in ("more draws", "one draw at equal gradients"):
            yield skipped(name, "nothing is random, or one draw per step is all there is")
    else:
        yield compared(bench, "more draws", "one draw", bench.climbed("one draw", draws=1))
        spread = bench.climbed("one draw at equal gradients", **bench.one_draw)
        yield compared(bench, "one draw at equal gradients", "one draw and more steps", spread)
    mean = getattr(bench.logits_fn, "mean", None)
    if not bench.logits_fn.stochastic or mean is None:
        yield skipped("mean network", "nothing is random, or the function knows no mean")
    else:
        transferred = bench.climbed("mean network", **bench.one_draw, logits_fn=mean())
        yield compared(bench, "mean network", "transfer from the mean network", transferred)


def compared(bench: Bench, name: str, weaker_name: str, weaker: np.ndarray) -> Check:
    """Fires if the attack that should be weaker leaves less accuracy than the one that is checked."""
    left = bench.base()
    evidence = {"accuracy": float(left.mean()), f"under {weaker_name}": float(weaker.mean())}
    if not beyond(left - weaker):
        if not perhaps(left - weaker):
            return Check(name, "ok", "", evidence)
        why = f"{MORE_BUDGET}: {weaker_name} leaves less, and so few examples do not say by chance or not"
        return doubted(name, why, evidence)
    again = bench.base(MORE)
    evidence[f"at {MORE}x the budget"] = float(again.mean())
    return _verdict(name, beyond(again - weaker), evidence)


def _verdict(name: str, masks: bool, evidence: dict[str, float]) -> Check:
    if masks:
        advice = "more gradients do not close the gap: attack without them, or through a stand-in (BPDA)"
        return Check(name, "defense masks", advice, evidence)
    advice = "spend more gradients, or spend them as the attack that won; the reported accuracy is too high"
    return Check(name, "attack too weak", advice, evidence)


def _without_gradient(bench: Bench, attack: Attack | None) -> np.ndarray:
    """Verdicts after an attack by queries, as many as the others take gradients."""
    if attack is None:
        attack = partial(square, max_queries=max(bench.num_gradients, FEWEST_QUERIES))
    return bench.reached(partial(attack, eps=bench.eps), draws=1)


def _unbounded(bench: Bench) -> Check:
    """Indicator 6 (unconstrained attack failure): with the whole box to move in, chance is left."""
    name, chance = "unbounded attack", 1 / bench.num_classes
    left = bench.climbed(name, eps=bench.unbounded)
    evidence = {"accuracy": float(left.mean()), "chance": chance}
    if not beyond(left - chance):
        return Check(name, "ok", "", evidence)
    again = bench.climbed(name, eps=bench.unbounded, **bench.budget(MORE))
    evidence[f"at {MORE}x the budget"] = float(again.mean())
    return _verdict(name, beyond(again - chance), evidence)
