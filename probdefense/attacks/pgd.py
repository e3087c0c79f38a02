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

from probdefense.attacks.tools.border import attack
from probdefense.attacks.tools.gradient import input_gradient
from probdefense.attacks.tools.selection import Best, Goal, check_active_set, remaining_margin
from probdefense.logits.losses import expected_cross_entropy
from probdefense.logits.rules import mean_prob
from probdefense.ops import Ball, lp_norm, per_example
from probdefense.rng import Stream
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

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> x_adv = pgd(net, torch.rand(2, 4), torch.tensor([0, 1]), eps=0.1, num_steps=3, seed=0)
    """
    check_active_set(active_set, logits_fn)
    goal = Goal(y, target, loss, rule)
    rng, ball, best = Stream.of(seed, x), Ball(x, eps, norm), Best(x)
    for _ in range(num_restarts):
        points = ascend(
            logits_fn,
            ball,
            ball.start(rng) if random_start else x,
            goal,
            step_size=2.5 * ball.radius / num_steps if step_size is None else step_size,
            num_steps=num_steps,
            repeats=repeats,
            active_set=active_set,
            name="pgd",
        )
        if num_restarts == 1:
            return points
        best.offer(points, remaining_margin(logits_fn, points, y, rule, target))
    return best.x


@attack
def bim(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    eps: float,
    norm: Norm = math.inf,
    step_size: float | None = None,
    num_steps: int = 30,
    loss: LossFn = expected_cross_entropy,
    repeats: int = 1,
    target: Labels | None = None,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""Basic iterative method (I-FGSM) from the clean input, $x_{t+1} = \Pi(x_t + \alpha\, d_t)$.

    It is `pgd` without the random start and with steps that only together reach the sphere.

    Args:
        logits_fn: What is attacked.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        eps: Radius in pixels.
        norm: 1, 2 or ``inf``.
        step_size: $\alpha$ in pixels; $\epsilon / T$ by default.
        num_steps: $T$.
        loss: What is climbed, over the draws of one call.
        repeats: Calls whose gradients are averaged in every step.
        target: Classes wanted; the loss at them is descended instead.
        seed: An int, one per example, or a generator; fixes the draws of a random defense.
        max_batch: Examples at once.

    Returns:
        Points of the ball, ``(batch, *event)``.

    Raises:
        ValueError: bad inputs or settings.

    References:
        Kurakin et al., 2017, [Adversarial Examples in the Physical World](https://arxiv.org/abs/1607.02533)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> x_adv = bim(net, torch.rand(2, 4), torch.tensor([0, 1]), eps=0.1, num_steps=3)
    """
    ball = Ball(x, eps, norm)
    return ascend(
        logits_fn,
        ball,
        x,
        Goal(y, target, loss),
        step_size=ball.radius / num_steps if step_size is None else step_size,
        num_steps=num_steps,
        repeats=repeats,
        name="bim",
    )


@attack
def mim(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    eps: float,
    norm: Norm = math.inf,
    step_size: float | None = None,
    num_steps: int = 10,
    momentum: float = 1.0,
    loss: LossFn = expected_cross_entropy,
    repeats: int = 1,
    signs: bool = False,
    target: Labels | None = None,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""Momentum iterative method, $x_{t+1} = \Pi(x_t + \alpha\, d(v_t))$ along a decaying sum of gradients.

    $$ v_t = \mu v_{t-1} + g_t / \|g_t\|_1 $$

    On a random defense the momentum also averages the draws of past steps.

    Args:
        logits_fn: What is attacked.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        eps: Radius in pixels.
        norm: 1, 2 or ``inf``.
        step_size: $\alpha$ in pixels; $\epsilon / T$ by default.
        num_steps: $T$.
        momentum: $\mu$, what is kept of the directions so far.
        loss: What is climbed, over the draws of one call.
        repeats: Calls whose gradients are averaged in every step.
        signs: Whether the signs of the gradients of these calls are averaged instead, so that no call
            outweighs the others: with one draw per call, what Sitawarin et al. find strongest against
            random transforms.
        target: Classes wanted; the loss at them is descended instead.
        seed: An int, one per example, or a generator; fixes the draws of a random defense.
        max_batch: Examples at once.

    Returns:
        Points of the ball, ``(batch, *event)``.

    Raises:
        ValueError: bad inputs or settings.

    References:
        Dong et al., 2018, [Boosting Adversarial Attacks with Momentum](https://arxiv.org/abs/1710.06081);
        Sitawarin et al., 2022, [Demystifying the Adversarial Robustness of Random Transformation
        Defenses](https://arxiv.org/abs/2207.03574), for the signs

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> x_adv = mim(net, torch.rand(2, 4), torch.tensor([0, 1]), eps=0.1, num_steps=3)
    """
    ball = Ball(x, eps, norm)
    return ascend(
        logits_fn,
        ball,
        x,
        Goal(y, target, loss),
        step_size=ball.radius / num_steps if step_size is None else step_size,
        num_steps=num_steps,
        repeats=repeats,
        signs=signs,
        momentum=momentum,
        name="mim",
    )


def ascend(
    logits_fn: LogitsFn,
    ball: Ball,
    points: Inputs,
    goal: Goal,
    *,
    step_size: float | Tensor,
    num_steps: int,
    repeats: int = 1,
    signs: bool = False,
    momentum: float | None = None,
    active_set: bool = False,
    name: str,
) -> Inputs:
    """The loop that all iterated steepest-ascent attacks share; returns the last points."""
    final, rows = points.clone(), torch.arange(len(points), device=points.device)
    velocity = torch.zeros_like(points)
    step = torch.as_tensor(step_size, dtype=points.dtype, device=points.device).expand_as(ball.radius)
    for number in range(num_steps):
        slope = input_gradient(
            logits_fn, points, goal.climbed, repeats=repeats, signs=signs, where=f"{name}, step {number}"
        )
        direction = slope.gradient
        if active_set:
            standing = goal.remaining(slope.logits) > 0
            final[rows] = points
            rows, points, velocity, step, direction = (
                part[standing] for part in (rows, points, velocity, step, direction)
            )
            ball, goal = ball.take(standing), goal.take(standing)
            if len(rows) == 0:
                return final
        if momentum is not None:
            flat = per_example(lp_norm(direction, 1), direction).clamp_min(1e-30)
            velocity = direction = momentum * velocity + direction / flat
        points = ball.project(points + step * ball.steepest(direction, points))
    final[rows] = points
    return final
