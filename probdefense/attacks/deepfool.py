r"""DeepFool: to the nearest boundary of the linearized classifier, again and again.

Moosavi-Dezfooli et al., 2016, [DeepFool: a simple and accurate method to fool deep neural
networks](https://arxiv.org/abs/1511.04599). With $g_k = z_k - z_y$ and $w_k = \nabla g_k$, a step goes
to the class with the smallest first-order distance, in the norm $p$ with dual $q$:

$$ \hat k = \arg\min_k \frac{|g_k|}{\|w_k\|_q}, \qquad
   x_{t+1} = x_t + (1 + \eta) \frac{|g_{\hat k}|}{\|w_{\hat k}\|_q} d_p(w_{\hat k}) $$
"""

import math

import torch
from torch import Tensor

from probdefense.attacks.tools.border import attack
from probdefense.attacks.tools.gradient import ask, input_jacobian
from probdefense.attacks.tools.selection import Closest, Goal
from probdefense.attacks.tools.settle import settle, surrogate
from probdefense.logits.rules import mean_prob
from probdefense.ops import Ball, is_class, lp_norm, movable, per_example
from probdefense.types import Inputs, Labels, Logits, LogitsFn, Norm, Rule, Seed


@attack
def deepfool(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    norm: Norm = 2,
    num_steps: int = 50,
    num_candidates: int = 9,
    overshoot: float = 0.02,
    rule: Rule = mean_prob,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""DeepFool, all examples at once; a cheap first answer rather than the nearest point.

    Coordinates that the box holds take no part in a step. A random defense is solved on frozen draws,
    by the scores of the mean probability, and the points are settled on others.

    Args:
        logits_fn: What is attacked; ``samples(n)`` sets the draws that are frozen, 16 by default.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        norm: 2 or ``inf``.
        num_steps: Steps at most; an example leaves when it is wrong.
        num_candidates: Classes considered per step, the most likely wrong ones; each costs a gradient.
        overshoot: $\eta$, how far past the linear boundary a step goes.
        rule: The decision that must be wrong.
        seed: An int, one per example, or a generator; fixes the draws of a random defense.
        max_batch: Examples at once.

    Returns:
        Wrong points, ``(batch, *event)``; `x` itself where none was found.

    Raises:
        ValueError: bad inputs or settings, L1, or a random function that cannot be frozen.

    References:
        Moosavi-Dezfooli et al., 2016, [DeepFool: a simple and accurate method to fool deep neural
        networks](https://arxiv.org/abs/1511.04599)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> x_adv = deepfool(net, torch.rand(2, 4), torch.tensor([0, 1]), num_steps=5)
    """
    if norm == 1:
        raise ValueError("expected norm 2 or math.inf for deepfool, got 1; ead and fmn have an L1 form")
    function, closest = surrogate(logits_fn, "deepfool"), Closest(x, norm)
    goal = Goal(y, rule=rule, sure=logits_fn.stochastic).measured(ask(function, x))
    rows, points = closest.rows, x
    for number in range(num_steps):
        wanted = goal.take(rows)

        def leads(logits: Logits, wanted: Goal = wanted) -> Tensor:
            return _leads(logits, wanted, num_candidates)

        slope = input_jacobian(function, points, leads, where=f"deepfool, step {number}")
        wrong = wanted.remaining(slope.logits) <= 0
        closest.offer(points, wrong, rows)
        behind = wanted.slack(slope.logits).to(x.dtype) - slope.value
        moved = points + (1 + overshoot) * _to_nearest(slope.gradient, behind, points, norm)
        rows, points = rows[~wrong], moved[~wrong].clamp(0.0, 1.0)
        if len(rows) == 0:
            break
    closest.x[rows] = points  # nearly wrong; settling may get them there
    return settle(logits_fn, x, closest.x, goal)


def _leads(logits: Logits, goal: Goal, count: int) -> Tensor:
    """How far the most likely wrong classes are ahead of the true one, ``(batch, count)``."""
    logits, factor = goal.standard(logits)
    scores = mean_prob(logits)
    truth = is_class(goal.y, scores.shape[-1])
    rivals = scores.masked_fill(truth, -torch.inf).topk(min(count, scores.shape[-1] - 1), dim=-1).values
    return (rivals - scores.gather(1, goal.y.unsqueeze(1))) * torch.as_tensor(factor).unsqueeze(-1)


def _to_nearest(slopes: Tensor, behind: Tensor, points: Inputs, norm: Norm) -> Tensor:
    """The step to the nearest of the linear boundaries, from slopes ``(classes, batch, *event)``."""
    free = movable(slopes, points)
    steepness = torch.stack([lp_norm(slope, {2: 2, math.inf: 1}[norm]) for slope in free])
    distance, nearest = (behind.clamp_min(0.0) / steepness.clamp_min(1e-12)).min(0)
    distance = torch.where(distance.isinf(), 0.0, distance)  # every candidate is ruled out
    chosen = free[nearest, torch.arange(len(points), device=points.device)]
    return per_example(distance, points) * Ball(points, 0.0, norm).steepest(chosen, points)
