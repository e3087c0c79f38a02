r"""Decoupled direction and norm: the nearest wrong point in L2, by steps on a sphere that breathes.

Rony et al., 2019, [Decoupling Direction and Norm for Efficient Gradient-Based L2 Adversarial Attacks
and Defenses](https://arxiv.org/abs/1811.09600). Every step climbs the loss by a fixed length and is
put back on a sphere around `x`, which shrinks while the point is wrong and grows while it is right:

$$ \epsilon_{t+1} = (1 \mp \gamma)\, \epsilon_t, \qquad
   x_{t+1} = x + \epsilon_{t+1} \frac{\delta_t + \alpha_t d_t}{\|\delta_t + \alpha_t d_t\|_2} $$
"""

import torch

from probdefense.attacks.tools.border import attack
from probdefense.attacks.tools.gradient import ask, input_gradient
from probdefense.attacks.tools.selection import Closest, Goal
from probdefense.attacks.tools.settle import settle, surrogate
from probdefense.logits.losses import predictive_log_odds
from probdefense.logits.rules import mean_prob
from probdefense.ops import Ball, annealed, lp_norm, per_example
from probdefense.types import Inputs, Labels, LogitsFn, LossFn, Rule, Seed


@attack
def ddn(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    num_steps: int = 100,
    init_eps: float = 1.0,
    gamma: float = 0.05,
    loss: LossFn = predictive_log_odds,
    rule: Rule = mean_prob,
    target: Labels | None = None,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""Decoupled direction and norm, the nearest wrong point in L2.

    A random defense is solved on frozen draws and the points are settled on others.

    Args:
        logits_fn: What is attacked; ``samples(n)`` sets the draws that are frozen, 16 by default.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        num_steps: $T$, gradient steps.
        init_eps: $\epsilon_0$ in pixels.
        gamma: $\gamma$, by which the sphere breathes, in (0, 1).
        loss: What is climbed; only its direction matters.
        rule: The decision that must be wrong.
        target: Classes wanted instead of any wrong one.
        seed: An int, one per example, or a generator; fixes the draws of a random defense.
        max_batch: Examples at once.

    Returns:
        Wrong points, ``(batch, *event)``; `x` itself where none was found.

    Raises:
        ValueError: bad inputs or settings, or a random function that cannot be frozen.

    References:
        Rony et al., 2019, [Decoupling Direction and Norm for Efficient Gradient-Based L2 Adversarial
        Attacks and Defenses](https://arxiv.org/abs/1811.09600)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> x_adv = ddn(net, torch.rand(2, 4), torch.tensor([0, 1]), num_steps=5)
    """
    function, closest = surrogate(logits_fn, "ddn"), Closest(x, 2)
    goal = Goal(y, target, loss, rule, sure=logits_fn.stochastic).measured(ask(function, x))
    points, ball = x, Ball(x, init_eps, 2)
    eps = torch.full((len(x),), init_eps, dtype=x.dtype, device=x.device)
    for number in range(num_steps):
        slope = input_gradient(function, points, goal.climbed, where=f"ddn, step {number}")
        wrong = goal.remaining(slope.logits) <= 0
        closest.offer(points, wrong)
        eps = eps * torch.where(wrong, 1 - gamma, 1 + gamma)
        step = annealed(1.0, 0.01, number / num_steps)
        delta = points - x + step * ball.steepest(slope.gradient, points)
        length = per_example(eps / lp_norm(delta, 2).clamp_min(1e-12), x)
        points = (x + length * delta).clamp(0.0, 1.0)
    return settle(logits_fn, x, closest.x, goal)
