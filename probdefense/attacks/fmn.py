r"""Fast minimum norm: the nearest wrong point in l-inf, L2 or L1.

Pintor et al., 2021, [Fast Minimum-norm Adversarial Attacks through Adaptive Norm
Constraints](https://arxiv.org/abs/2102.12827). Gradient steps inside a ball whose radius is found on
the way: the first-order distance to the boundary until a wrong point is known, then a little less than
the best while wrong and a little more while right, $\epsilon_{t+1} = (1 \mp \gamma_t)\, \epsilon_t$.
"""

import math

import torch

from probdefense.attacks.tools.border import attack
from probdefense.attacks.tools.gradient import ask, input_gradient
from probdefense.attacks.tools.selection import Closest, Goal
from probdefense.attacks.tools.settle import settle, surrogate
from probdefense.logits.losses import predictive_log_odds
from probdefense.logits.rules import mean_prob
from probdefense.ops import Ball, annealed, lp_norm
from probdefense.types import Inputs, Labels, LogitsFn, LossFn, Norm, Rule, Seed

DUAL = {1: math.inf, 2: 2, math.inf: 1}


@attack
def fmn(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    norm: Norm = 2,
    num_steps: int = 100,
    step_size: float = 1.0,
    gamma: float = 0.05,
    loss: LossFn = predictive_log_odds,
    rule: Rule = mean_prob,
    target: Labels | None = None,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""Fast minimum norm, the nearest wrong point in the given norm.

    A random defense is solved on frozen draws and the points are settled on others.

    Args:
        logits_fn: What is attacked; ``samples(n)`` sets the draws that are frozen, 16 by default.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        norm: 1, 2 or ``inf``.
        num_steps: $T$, gradient steps.
        step_size: L2 length of the first step in pixels; it falls to a hundredth.
        gamma: $\gamma_0$, by which the ball breathes, in (0, 1); it falls to a fiftieth.
        loss: What is climbed; near the boundary it must be near 0.
        rule: The decision that must be wrong.
        target: Classes wanted instead of any wrong one.
        seed: An int, one per example, or a generator; fixes the draws of a random defense.
        max_batch: Examples at once.

    Returns:
        Wrong points, ``(batch, *event)``; `x` itself where none was found.

    Raises:
        ValueError: bad inputs or settings, or a random function that cannot be frozen.

    References:
        Pintor et al., 2021, [Fast Minimum-norm Adversarial Attacks through Adaptive Norm
        Constraints](https://arxiv.org/abs/2102.12827)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> x_adv = fmn(net, torch.rand(2, 4), torch.tensor([0, 1]), norm=math.inf, num_steps=5)
    """
    function, closest = surrogate(logits_fn, "fmn"), Closest(x, norm)
    goal = Goal(y, target, loss, rule, sure=logits_fn.stochastic).measured(ask(function, x))
    points, eps = x, torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for number in range(num_steps):
        slope = input_gradient(function, points, goal.climbed, where=f"fmn, step {number}")
        wrong = goal.remaining(slope.logits) <= 0
        closest.offer(points, wrong)
        breath = annealed(gamma, gamma / 50, number / num_steps)
        to_boundary = slope.value.abs() / lp_norm(slope.gradient, DUAL[norm]).clamp_min(1e-12)
        larger = (1 + breath) * eps
        unknown = torch.maximum(lp_norm(points - x, norm) + to_boundary, larger)
        outside = torch.where(closest.distance < math.inf, larger, unknown)
        eps = torch.where(wrong, torch.minimum((1 - breath) * eps, closest.distance), outside)
        step = annealed(step_size, step_size / 100, number / num_steps)
        direction = Ball(x, eps, 2).steepest(slope.gradient, points)
        points = Ball(x, eps, norm).project(points + step * direction)
    return settle(logits_fn, x, closest.x, goal)
