r"""Distance against success, $\min_\delta\ D(\delta) + c \max(\kappa - m(x + \delta), 0)$, for the right $c$.

A small constant finds no wrong point, a large one finds a far one. The constant is therefore bisected
for every example on its own, and an example whose cost has stalled leaves the descent.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from probdefense.attacks.tools.gradient import ask, input_gradient
from probdefense.attacks.tools.selection import Closest, Goal
from probdefense.types import Inputs, Logits, LogitsFn, Norm

State = tuple[Tensor, ...]
"""What a descent remembers per example; the first part are the points."""


class Descent(NamedTuple):
    """How points descend a cost: where they start, what distance costs, and how they move.

    ``start(x)`` gives the first `State`; ``move(x, state, gradient, number)`` the next one, given the
    gradient of what is climbed; ``distance(delta)`` is $D$, ``(batch,)``.
    """

    start: Callable[[Inputs], State]
    move: Callable[[Inputs, State, Tensor, int], State]
    distance: Callable[[Tensor], Tensor]
    norm: Norm
    name: str


def cheapest(
    function: LogitsFn,
    x: Inputs,
    goal: Goal,
    descent: Descent,
    *,
    num_steps: int,
    num_searches: int,
    init_c: float,
    confidence: float,
) -> tuple[Inputs, Goal]:
    """The nearest wrong points met while the constant of every example is bisected, and the goal measured."""
    goal, closest = goal.measured(ask(function, x)), Closest(x, descent.norm)
    c = torch.full((len(x),), init_c, dtype=x.dtype, device=x.device)
    low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
    for _ in range(num_searches):
        found = _descend(function, x, goal, descent, closest, c, num_steps, confidence)
        low, high = torch.where(found, low, c), torch.where(found, c, high)
        c = torch.where(high < torch.inf, (low + high) / 2, 10 * c)
    return closest.x, goal


def hinge(goal: Goal, c: Tensor | float, confidence: float, logits: Logits) -> Tensor:
    r"""Minus $c \max(\kappa - m, 0)$, which is climbed, ``(batch,)``; $\kappa$ in nats of the network."""
    return -c * (goal.nats(confidence) + goal.slack(logits) - goal.climbed(logits)).clamp_min(0.0)


def _descend(
    function: LogitsFn,
    x: Inputs,
    goal: Goal,
    descent: Descent,
    closest: Closest,
    c: Tensor,
    num_steps: int,
    confidence: float,
) -> Tensor:
    """One descent with given constants; whether it met a wrong point, bool ``(batch,)``."""
    found, rows, state = torch.zeros_like(c, dtype=torch.bool), closest.rows, descent.start(x)
    least, stalled = torch.full_like(c, torch.inf), torch.zeros_like(c)
    for number in range(num_steps):
        origin, wanted, points = x[rows], goal.take(rows), state[0]
        climbed = partial(hinge, wanted, c[rows], confidence)
        slope = input_gradient(function, points, climbed, where=f"{descent.name}, step {number}")
        wrong = wanted.remaining(slope.logits) <= 0
        closest.offer(points, wrong, rows)
        found[rows] |= wrong
        cost = descent.distance(points - origin) - slope.value
        stalled = torch.where(cost < 0.9999 * least, 0.0, stalled + 1)
        least = torch.minimum(least, cost)
        state = descent.move(origin, state, slope.gradient, number)
        going = stalled < max(10, num_steps // 5)
        rows, least, stalled = rows[going], least[going], stalled[going]
        state = tuple(part[going] for part in state)
        if len(rows) == 0:
            break
    return found
