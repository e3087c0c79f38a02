r"""From the boundary of frozen draws to a point that stays wrong when the draws are new.

A minimum-norm attack needs a function that does not change under its hands, so on a random defense it
solves on frozen draws. Its answer lies on the boundary of that surrogate, where about half of the
points are right again under fresh draws, at any radius. It is therefore moved along its own ray,
$x + t\,(x_{adv} - x)$, to the smallest $t$ at which a verdict on held-out draws is right with a
probability of at most 1 %. Without randomness the same search brings a point back to the boundary.
"""

import torch
from torch import Tensor

from probdefense.attacks.tools.gradient import ask
from probdefense.attacks.tools.selection import STANDARD, Goal
from probdefense.logits.adapters import Samples, can_freeze
from probdefense.ops import per_example
from probdefense.types import Inputs, LogitsFn

FROZEN_DRAWS = 16
"""Draws that a random defense is solved on, unless ``samples(n)`` says otherwise."""

HELD_OUT_DRAWS = 32
"""Draws on which points are settled: neither those that were solved on, nor those of a verdict."""

ROUNDING = 1e-6 * STANDARD
"""A millionth of the spread: so far wrong must a point be that no other batch size rounds it back."""

STRIDE, STRIDES, HALVINGS = 1.15, 12, 8
"""The search along the ray: growth per step, steps out (to 5.4 times), and bisections back."""


def surrogate(logits_fn: LogitsFn, name: str) -> LogitsFn:
    """The function itself, or with its draws frozen if it is random.

    Raises:
        ValueError: a random function that cannot freeze its draws.
    """
    if not logits_fn.stochastic:
        return logits_fn
    if not can_freeze(logits_fn):
        raise ValueError(
            f"{name} looks for the nearest wrong point, which a function that answers at random does not "
            "have; expected a LogitsFn with freeze(num_samples), such as a Defense, or a fixed-budget attack"
        )
    return logits_fn.freeze(getattr(logits_fn, "num_samples", None) or FROZEN_DRAWS)


def held_out(logits_fn: LogitsFn, num_samples: int = HELD_OUT_DRAWS) -> LogitsFn:
    """The function as a judge: on draws that served nothing else, held fixed if they can be."""
    if not logits_fn.stochastic:
        return logits_fn
    return logits_fn.freeze(num_samples) if can_freeze(logits_fn) else Samples(logits_fn, num_samples)


def settle(logits_fn: LogitsFn, x: Inputs, x_adv: Inputs, goal: Goal) -> Inputs:
    """Moves every point along its ray from `x` to where the rule is just wrong, for any draws.

    Where no length of the ray is wrong for sure, the answer is `x` itself, or on a random defense the
    point as it was found, which may still be wrong more often than not.

    Args:
        logits_fn: The function under attack, not its surrogate.
        x: ``(batch, *event)``.
        x_adv: The points found, ``(batch, *event)``.
        goal: What is wanted, measured at `x`.
    """
    judge = held_out(logits_fn)
    ray = x_adv - x

    def doubt(factor: Tensor, rows: Tensor) -> Tensor:
        points = (x[rows] + per_example(factor, x) * ray[rows]).clamp(0.0, 1.0)
        return goal.take(rows).remaining(ask(judge, points)) + ROUNDING

    rows = ray.flatten(1).any(1).nonzero().flatten()
    high = torch.ones(len(x), dtype=x.dtype, device=x.device)
    low, settled = torch.zeros_like(high), torch.zeros_like(high, dtype=torch.bool)
    for _ in range(STRIDES):
        if len(rows) == 0:
            break
        wrong = doubt(high[rows], rows) <= 0
        settled[rows[wrong]] = True
        rows = rows[~wrong]
        low[rows] = high[rows]
        high[rows] *= STRIDE
    rows = settled.nonzero().flatten()
    for _ in range(HALVINGS if len(rows) else 0):
        middle = (low[rows] + high[rows]) / 2
        wrong = doubt(middle, rows) <= 0
        high[rows], low[rows] = torch.where(wrong, middle, high[rows]), torch.where(wrong, low[rows], middle)
    factor = torch.where(settled, high, 1.0 if logits_fn.stochastic else 0.0)
    return (x + per_example(factor, x) * ray).clamp(0.0, 1.0)
