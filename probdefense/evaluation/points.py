"""From examples to points: runs an attack as configured, and refuses what no attack may return."""

import inspect
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probdefense.evaluation.arrays import exact
from probdefense.evaluation.examples import Chunk
from probdefense.logits.adapters import DRAWS, Samples, as_logits_fn, counted, with_options
from probdefense.ops import lp_norm, reach
from probdefense.prediction.drawing import Keyed
from probdefense.rng import derive, forked, hash_keys
from probdefense.types import Attack, Inputs, Labels, LogitsFn, Norm
from probdefense.validation import check_attack, check_count, check_member

ATTACK_SAMPLES = 16
"""Draws per attack call on a random defense, unless `with_draws` says otherwise."""

ALIKE = 4
"""So many points that lie at one distance speak of a fixed radius."""


@dataclass(frozen=True)
class WithDraws:
    """An attack and the number of draws per call with which it sees a random defense."""

    attack: Attack
    num_samples: int
    draws: str = "independent"

    def __call__(self, logits_fn: LogitsFn, x: Inputs, y: Labels, **options: Any) -> Inputs:
        """The attack on the function with that number of draws."""
        drawn = with_options(as_logits_fn(logits_fn), self.num_samples, self.draws)
        return self.attack(drawn, x, y, **options)


def with_draws(attack: Attack, num_samples: int, draws: str = "independent") -> WithDraws:
    """An attack that sees a random defense with a given number of draws per call.

    Args:
        attack: Any attack.
        num_samples: 1 for one draw per step, more for expectation over transformation.
        draws: ``"antithetic"`` for pairs of draws that differ in sign, whose gradients vary
            less; what an attack decides on stays independent.

    Returns:
        An attack with the options of `attack`.

    Raises:
        TypeError: something that cannot be called.
        ValueError: `num_samples` below 1.

    Examples:
        >>> import probdefense as pd
        >>> with_draws(pd.attacks.pgd, 16).num_samples
        16
    """
    check_attack(attack)
    check_member("draws", draws, DRAWS)
    return WithDraws(attack, check_count("num_samples", num_samples), draws)


class Threat(NamedTuple):
    """The threat model of an evaluation: a norm and the radii of its balls, in pixels."""

    norm: Norm
    radii: tuple[float, ...]

    def inside(self, distance: Tensor, radius: float, x: Inputs) -> Tensor:
        """Which of the measured distances count as within a radius, by the one tolerance there is."""
        return distance <= reach(radius, self.norm, x[0].numel(), x.dtype)


class Spent(NamedTuple):
    """What an attack cost: draws per call, evaluations in example x draw, and seconds."""

    attack_samples: int | None = None
    queries: int = 0
    gradients: int = 0
    seconds: float = 0.0


class Run(NamedTuple):
    """An attack at one radius, infinity if it has none, with the options that it gets."""

    label: str
    attack: Attack
    eps: float
    options: dict[str, Any]


class Found(NamedTuple):
    """The points of one run on a chunk, ``(batch, *event)``, and their distances, ``(batch,)``."""

    points: Inputs
    distance: Tensor
    spent: Spent


def runs(label: str, attack: Attack, threat: Threat) -> list[Run]:
    """The runs of an attack: at every radius, at the one that it fixes itself, or one without a budget.

    Raises:
        ValueError: an attack that fixes another norm, or a radius beyond those asked for.
    """
    free, fixed = configuration(attack)
    if "eps" not in free:
        fixed = _of_parts(attack, label, threat) | fixed
    budget = "eps" in free or "eps" in fixed
    if budget and fixed.get("norm", threat.norm) != threat.norm:
        raise ValueError(
            f"expected attacks in norm={threat.norm}, as this evaluation, got attack {label!r}, which fixes "
            f"norm={fixed['norm']}; leave norm out of its partial, or evaluate with that norm"
        )
    options = {"norm": threat.norm} if budget and "norm" in free else {}
    if "eps" in free:
        return [Run(label, attack, radius, {**options, "eps": radius}) for radius in threat.radii]
    eps = fixed.get("eps")
    if not isinstance(eps, int | float) and not (isinstance(eps, Tensor) and eps.dim() == 0):
        return [Run(label, attack, math.inf, options)]
    if float(eps) > max(threat.radii):
        raise ValueError(
            f"expected attacks within eps={max(threat.radii):g}, got attack {label!r}, which fixes "
            f"eps={float(eps):g}, beyond eps={max(threat.radii):g} of this evaluation; leave eps out of its "
            "partial, or evaluate at that radius"
        )
    return [Run(label, attack, float(eps), options)]


def _of_parts(attack: Attack, label: str, threat: Threat) -> dict[str, Any]:
    """What an attack made of others fixes through them: a norm, and the largest of their radii."""
    while isinstance(attack, partial | WithDraws):
        attack = attack.func if isinstance(attack, partial) else attack.attack
    found: dict[str, Any] = {}
    for part in getattr(attack, "parts", ()):
        for run in runs(label, part, threat):
            found["eps"] = max(run.eps, found.get("eps", 0.0))
    return found if found.get("eps", math.inf) < math.inf else {}


def configuration(attack: Attack) -> tuple[set[str], dict[str, Any]]:
    """The keywords that an attack still takes, and those that its user has fixed with ``partial``."""
    fixed: dict[str, Any] = {}
    while isinstance(attack, partial | WithDraws):
        if isinstance(attack, partial):
            fixed = {**attack.keywords, **fixed}
            attack = attack.func
        else:
            attack = attack.attack
    return set(inspect.signature(attack).parameters) - set(fixed), fixed


def _draws(attack: Attack) -> int:
    """Draws per call with which an attack sees a random defense: of several settings the innermost."""
    found = ATTACK_SAMPLES
    while isinstance(attack, partial | WithDraws):
        if isinstance(attack, WithDraws):
            found = attack.num_samples
        attack = attack.func if isinstance(attack, partial) else attack.attack
    return found


def attacked(
    logits_fn: LogitsFn, chunk: Chunk, run: Run, threat: Threat, *, seed: int, draw_chunk: int | None = None
) -> Found:
    """The points of one run on a chunk.

    Every random number belongs to (seed, attack, radius, chunk): those of the function under attack also to
    the number of the call, those that the attack draws itself to the example.

    Raises:
        TypeError: an attack that returns no tensor.
        ValueError: points that no attack may return.
    """
    x, num_samples, options = chunk.x, _draws(run.attack), run.options
    key = derive(seed, "attack", run.label, exact(run.eps))
    if "seed" in configuration(run.attack)[0]:
        options = {**options, "seed": hash_keys(key, chunk.ids)}
    key = derive(key, chunk.number)
    cost, start = counted(Keyed(logits_fn, key, draw_chunk)), time.perf_counter()
    with forked(derive(key, "own"), x.device):
        points = run.attack(Samples(cost, num_samples), x.clone(), chunk.y.clone(), **options)
    seconds = time.perf_counter() - start
    if not isinstance(points, Tensor):
        raise TypeError(
            f"attack {run.label!r} returned {type(points).__name__}, expected a tensor of points; return x "
            "itself where nothing is found"
        )
    spent = Spent(num_samples if logits_fn.stochastic else 1, cost.queries, cost.gradients, seconds)
    return Found(points.detach(), _distance(points.detach(), x, run.eps, threat, run.label), spent)


def _distance(points: Inputs, x: Inputs, eps: float, threat: Threat, label: str) -> Tensor:
    """How far every point is, ``(batch,)``.

    Raises:
        ValueError: another shape, NaN, outside [0, 1], outside the ball, or all at one larger radius.
    """
    if points.shape != x.shape:
        raise ValueError(
            f"attack {label!r} returned shape {tuple(points.shape)}, expected {tuple(x.shape)}; return one "
            "point per example, x itself where nothing is found"
        )
    if not bool(torch.isfinite(points).all()) or float(points.min()) < 0 or float(points.max()) > 1:
        raise ValueError(
            f"attack {label!r} returned points outside the box [0, 1], expected finite ones in it; clamp them"
        )
    distance = lp_norm((points.double() - x.double()), threat.norm)
    norm, largest = exact(threat.norm), float(distance.max())
    if not bool(threat.inside(distance, eps, x).all()):
        raise ValueError(
            f"attack {label!r} left the ball: it returned a perturbation of norm {largest:.6g}, "
            f"expected at most eps={exact(eps)} in the {norm} norm; project its points"
        )
    beyond = distance[~threat.inside(distance, max(threat.radii), x)]
    if len(beyond) >= ALIKE and 2 * int((beyond >= largest * (1 - 1e-4)).sum()) > int((distance > 0).sum()):
        raise ValueError(
            f"attack {label!r} takes no eps, and most of the points that it returned lie at {largest:.6g} in "
            f"the {norm} norm, expected at most eps={max(threat.radii):g}: it seems to fix a larger radius; "
            "give it the radius as eps="
        )
    return distance
