r"""Projected gradient ascent on the loss, and its older relatives.

Madry et al., 2018, [Towards Deep Learning Models Resistant to Adversarial
Attacks](https://arxiv.org/abs/1706.06083). Three holes that the norm fills (start, steepest,
project) and one loop:

$$ x_{t+1} = \Pi_{x,\epsilon}\big(x_t + \alpha\, d_t\big), \qquad
   d_t = \arg\max_{\|d\|_p \le 1} \langle \nabla_x \ell(x_t), d \rangle $$

On a random defense the loss runs over the draws of a call, so expectation over transformation is
not an option of the attack: ``pgd(defense.samples(16), ...)`` climbs the mean over 16 draws.
"""

import math

import torch
from torch import Tensor

from probdefense.attacks.border import attack
from probdefense.attacks.gradient import climb, input_gradient
from probdefense.attacks.selection import Best, remaining_margin
from probdefense.losses import expected_cross_entropy
from probdefense.ops import Ball, lp_norm, per_example
from probdefense.rng import Stream
from probdefense.rules import margins, mean_prob
from probdefense.types import Inputs, Labels, LogitsFn, LossFn, Norm, Rule, Seed


@attack
def pgd(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    eps: float,
    norm: Norm = math.inf,
    step_size: float | None = None,
    num_steps: int = 40,
    random_start: bool = True,
    num_restarts: int = 1,
    loss: LossFn = expected_cross_entropy,
    rule: Rule = mean_prob,
    repeats: int = 1,
    active_set: bool = False,
    target: Labels | None = None,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""Projected gradient descent (ascent on the loss), $x_{t+1} = \Pi(x_t + \alpha\, d_t)$.

    Args:
        logits_fn: What is attacked.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        eps: Radius in pixels.
        norm: 1, 2 or ``inf``.
        step_size: $\alpha$ in pixels; $2.5\,\epsilon / T$ by default.
        num_steps: $T$, gradient steps per restart.
        random_start: Whether to start from a random point of the ball.
        num_restarts: Runs; the one with the smallest margin of `rule` on fresh draws is kept.
        loss: What is climbed, over the draws of one call.
        rule: The decision rule by which restarts are compared.
        repeats: Calls whose gradients are averaged in every step, when memory is short.
        active_set: Whether an example leaves once it is misclassified; for functions without
            randomness only, because one unlucky draw is not a success.
        target: Classes wanted; the loss at them is descended instead.
        seed: An int, one per example, or a generator; fixes every random number of the attack.
        max_batch: Examples at once.

    Returns:
        Points of the ball, ``(batch, *event)``.

    Raises:
        ValueError: bad inputs or settings, or an active set on a random function.

    References:
        Madry et al., 2018, [Towards Deep Learning Models Resistant to Adversarial
        Attacks](https://arxiv.org/abs/1706.06083)

    Example:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> x_adv = pgd(net, torch.rand(2, 4), torch.tensor([0, 1]), eps=0.1, num_steps=3, seed=0)
    """
    _check_active_set(active_set, logits_fn)
    rng, ball, best = Stream.of(seed, x), Ball(x, eps, norm), Best(x)
    for _ in range(num_restarts):
        points = ascend(
            logits_fn,
            ball,
            ball.start(rng) if random_start else x,
            y,
            step_size=2.5 * ball.radius / num_steps if step_size is None else step_size,
            num_steps=num_steps,
            loss=loss,
            repeats=repeats,
            active_set=active_set,
            target=target,
            name="pgd",
        )
        if num_restarts == 1:
            return points
        best.offer(points, remaining_margin(logits_fn, points, y, rule, target))
    return best.x


def ascend(
    logits_fn: LogitsFn,
    ball: Ball,
    points: Inputs,
    y: Labels,
    *,
    step_size: float | Tensor,
    num_steps: int,
    loss: LossFn,
    repeats: int = 1,
    momentum: float | None = None,
    active_set: bool = False,
    target: Labels | None = None,
    name: str,
) -> Inputs:
    """The loop that all iterated steepest-ascent attacks share; returns the last points."""
    points, velocity = points.clone(), torch.zeros_like(points)
    step = torch.as_tensor(step_size, dtype=points.dtype, device=points.device).expand_as(ball.radius)
    rows: slice | Tensor = slice(None)
    for number in range(num_steps):
        goal = None if target is None else target[rows]
        slope = input_gradient(
            logits_fn,
            points[rows],
            climb(loss, y[rows], goal),
            repeats=repeats,
            where=f"{name}, step {number}",
        )
        direction = slope.gradient
        if momentum is not None:
            flat = per_example(lp_norm(direction, 1), direction).clamp_min(1e-30)
            direction = velocity[rows] = momentum * velocity[rows] + direction / flat
        moved = ball.take(rows).project(
            points[rows] + step[rows] * ball.take(rows).steepest(direction, points[rows])
        )
        if not active_set:
            points = moved
            continue
        standing = margins(mean_prob, slope.logits, y[rows])[0] > 0
        if goal is not None:
            standing = margins(mean_prob, slope.logits, goal)[0] <= 0
        rows = torch.arange(len(points), device=points.device)[rows][standing]
        points[rows] = moved[standing]
        if len(rows) == 0:
            break
    return points


def _check_active_set(active_set: bool, logits_fn: LogitsFn) -> None:
    if active_set and logits_fn.stochastic:
        raise ValueError("active_set=True needs a function without randomness; freeze the defense first")
