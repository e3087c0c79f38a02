r"""HopSkipJump: the nearest wrong point from decisions alone.

Chen, Jordan and Wainwright, 2020, [HopSkipJumpAttack](https://arxiv.org/abs/1904.02144). From a wrong
point it walks along the boundary: bisect towards `x` until the decision changes, find the normal of
the boundary there from the decisions $\phi = \pm 1$ at random points around, step along it and repeat.

$$ v = \frac1n \sum_{k=1}^n (\phi(x_t + \delta u_k) - \bar\phi)\, u_k, \qquad
   x_{t+1} = B\Big(x, x_t + \frac{\|x_t - x\|_p}{\sqrt t}\, d(v)\Big) $$

On a random defense a decision is that of the rule on repeated draws.
"""

import math

import torch
from torch import Tensor

from probdefense.attacks.tools.border import attack
from probdefense.attacks.tools.queries import Queries, random_directions
from probdefense.attacks.tools.selection import Closest, Goal
from probdefense.attacks.tools.settle import settle
from probdefense.logits.rules import vote
from probdefense.ops import Ball, lp_norm, per_example
from probdefense.progress import track
from probdefense.rng import Stream
from probdefense.types import Inputs, Labels, LogitsFn, Norm, Rule, Seed

TRIALS = 50
"""Random images tried as a wrong point to start from."""

HALVINGS, BISECTIONS = 8, 10
"""Queries of a step, halved until its end is wrong, and of the way back to the boundary."""

NOISY_WIDTH = 0.5
"""How far around a point a random defense is probed, as a share of its distance from `x`."""


@attack
def hop_skip_jump(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    norm: Norm = 2,
    num_directions: int = 100,
    max_queries: int = 10_000,
    start: Inputs | None = None,
    rule: Rule = vote,
    frozen: bool = False,
    target: Labels | None = None,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""HopSkipJump, the nearest wrong point in l-inf or L2, from decisions alone.

    Args:
        logits_fn: What is attacked; ``samples(n)`` sets how many draws make a decision.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        norm: 2 or ``inf``.
        num_directions: Random points of the first estimate; it grows as $\sqrt t$.
        max_queries: Forward evaluations per example, every draw counting as one.
        start: Wrong images to start from, ``(batch, *event)``; random ones are tried by default.
        rule: How the draws of an answer decide.
        frozen: Whether the attacker knows the randomness of the defense and holds its draws fixed.
        target: Classes wanted instead of any wrong one; needs `start` as a rule.
        seed: An int, one per example, or a generator; fixes every random number of the attack.
        max_batch: Examples at once.

    Returns:
        Wrong points, ``(batch, *event)``; `x` itself where none was found.

    Raises:
        ValueError: bad inputs or settings, L1, or a budget below one step.

    References:
        Chen, Jordan and Wainwright, 2020, [HopSkipJumpAttack: A Query-Efficient Decision-Based
        Attack](https://arxiv.org/abs/1904.02144)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> x_adv = hop_skip_jump(net, torch.rand(2, 4), torch.tensor([0, 1]), max_queries=1000)
    """
    if norm == 1:
        raise ValueError("expected norm 2 or math.inf for hop_skip_jump, got 1; take another attack for L1")
    rng, goal = Stream.of(seed, x), Goal(y, target, rule=rule)
    queries = Queries(logits_fn, x, goal, max_queries, frozen=frozen)
    points = _first(queries, x, rng) if start is None else start
    points = _bisect(queries, x, torch.where(per_example(queries.wrong(points[None])[0], x), points, x), norm)
    for number, count in enumerate(track(_plan(queries, num_directions), "hop_skip_jump"), 1):
        normal = _normal(queries, points, per_example(lp_norm(points - x, norm), x), count, rng)
        step = per_example(lp_norm(points - x, norm) / math.sqrt(number), x)
        ahead = _leap(queries, points, step * Ball(x, 0.0, norm).steepest(normal, points))
        points = _bisect(queries, x, ahead, norm)
    goal = queries.goal._replace(sure=logits_fn.stochastic)
    return settle(logits_fn if frozen else queries, x, points, goal)


def _plan(queries: Queries, num_directions: int) -> list[int]:
    """Directions of every iteration that the budget pays for."""
    other = HALVINGS + BISECTIONS
    queries.rounds(num_directions + other, reserve=queries.settling)
    left = queries.rounds(1, reserve=queries.settling)
    plan: list[int] = []
    while True:
        count = round(num_directions * math.sqrt(len(plan) + 1))
        left -= count + other
        if left < 0:
            return plan
        plan.append(count)


def _first(queries: Queries, x: Inputs, rng: Stream) -> Inputs:
    """The nearest wrong one of some random black and white images, or `x`."""
    closest = Closest(x, 2)
    for _ in range(TRIALS):
        image = (rng.uniform(x.shape[1:]) < per_example(rng.uniform(), x)).to(x.dtype)
        closest.offer(image, queries.wrong(image.unsqueeze(0))[0])
    return closest.x


def _normal(queries: Queries, points: Inputs, distance: Tensor, count: int, rng: Stream) -> Tensor:
    """The direction into the wrong side of the boundary, from decisions at random points around."""
    directions = random_directions(rng.normal, count, points)
    directions = directions / directions.flatten(2).norm(dim=2).view(count, *distance.shape)
    width = distance * (NOISY_WIDTH if queries.stochastic else 1 / points[0].numel())
    side = 2.0 * queries.wrong((points + width * directions).clamp(0.0, 1.0)) - 1.0
    side = torch.where((side == side[0]).all(0), side, side - side.mean(0))
    return (side.view(count, *distance.shape) * directions).mean(0)


def _leap(queries: Queries, points: Inputs, step: Tensor) -> Inputs:
    """The end of the step, halved until it is wrong; the point itself if it never is."""
    ahead, open_ = points, torch.ones(len(points), dtype=torch.bool, device=points.device)
    for _ in range(HALVINGS):
        trial = (points + step).clamp(0.0, 1.0)
        landed = queries.wrong(trial.unsqueeze(0))[0] & open_
        ahead = torch.where(per_example(landed, points), trial, ahead)
        open_, step = open_ & ~landed, step / 2
        if not bool(open_.any()):
            break
    return ahead


def _bisect(queries: Queries, x: Inputs, points: Inputs, norm: Norm) -> Inputs:
    """The wrong end of a bisection between `x` and the points."""
    delta, distance = points - x, per_example(lp_norm(points - x, norm), x)
    low, high = torch.zeros_like(distance), torch.ones_like(distance)

    def at(share: Tensor) -> Inputs:
        return x + (share * delta if norm == 2 else delta.clamp(-share * distance, share * distance))

    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        wrong = per_example(queries.wrong(at(middle).unsqueeze(0))[0], x)
        low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
    return at(high)
