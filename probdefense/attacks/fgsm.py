r"""One-step attacks.

Goodfellow et al., 2015, [Explaining and Harnessing Adversarial Examples](https://arxiv.org/abs/1412.6572):
the steepest step of the linearized loss, $x' = \Pi(x + \epsilon\, \mathrm{sign}\, \nabla_x \ell)$.
"""

import math

import torch

from probdefense.attacks.tools.border import attack
from probdefense.attacks.tools.gradient import climb, input_gradient
from probdefense.logits.losses import expected_cross_entropy
from probdefense.ops import Ball
from probdefense.rng import Stream
from probdefense.types import Inputs, Labels, LogitsFn, LossFn, Norm, Seed


@attack
def fgsm(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    eps: float,
    norm: Norm = math.inf,
    step_size: float | None = None,
    random_start: bool = False,
    loss: LossFn = expected_cross_entropy,
    repeats: int = 1,
    target: Labels | None = None,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""Fast gradient sign method, $x' = \Pi_{x, \epsilon}(x + \alpha\, d)$ with $d$ the steepest step.

    With ``random_start=True`` and a step of $1.25\,\epsilon$ it is the inner attack of fast
    adversarial training (Wong et al., 2020).

    Args:
        logits_fn: What is attacked.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        eps: Radius in pixels.
        norm: 1, 2 or ``inf``.
        step_size: $\alpha$ in pixels; `eps`, or $1.25\,\epsilon$ from a random start, by default.
        random_start: Whether to start from a random point of the ball.
        loss: What is climbed, over the draws of one call.
        repeats: Calls whose gradients are averaged.
        target: Classes wanted; the loss at them is descended instead.
        seed: An int, one per example, or a generator; fixes every random number of the attack.
        max_batch: Examples at once.

    Returns:
        Points of the ball, ``(batch, *event)``.

    Raises:
        ValueError: bad inputs or settings.

    References:
        Goodfellow et al., 2015, [Explaining and Harnessing Adversarial
        Examples](https://arxiv.org/abs/1412.6572)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> x_adv = fgsm(net, torch.rand(2, 4), torch.tensor([0, 1]), eps=0.1)
    """
    rng = Stream.of(seed, x)
    ball = Ball(x, eps, norm)
    start = ball.start(rng) if random_start else x
    step = (1.25 * ball.radius if random_start else ball.radius) if step_size is None else step_size
    slope = input_gradient(logits_fn, start, climb(loss, y, target), repeats=repeats, where="fgsm")
    return ball.project(start + step * ball.steepest(slope.gradient, start))


@attack
def r_fgsm(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    eps: float,
    norm: Norm = math.inf,
    alpha: float | None = None,
    loss: LossFn = expected_cross_entropy,
    repeats: int = 1,
    target: Labels | None = None,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""A random step out of the sharp curvature at `x`, then FGSM with what is left of the budget.

    $$ x' = x + \alpha\, \mathrm{sign}\, N(0, I), \qquad
       x_{adv} = \Pi\big(x' + (\epsilon - \alpha)\, \mathrm{sign}\, \nabla_{x'} \ell(x')\big) $$

    The gradient is taken at the moved point $x'$. In other norms the random step is the steepest one
    along a Gaussian direction.

    Args:
        logits_fn: What is attacked.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        eps: Radius in pixels.
        norm: 1, 2 or ``inf``.
        alpha: Length of the random step in pixels, at most `eps`; $\epsilon / 2$ by default.
        loss: What is climbed, over the draws of one call.
        repeats: Calls whose gradients are averaged.
        target: Classes wanted; the loss at them is descended instead.
        seed: An int, one per example, or a generator; fixes every random number of the attack.
        max_batch: Examples at once.

    Returns:
        Points of the ball, ``(batch, *event)``.

    Raises:
        ValueError: bad inputs or settings, or `alpha` above `eps`.

    References:
        Tramer et al., 2018, [Ensemble Adversarial Training: Attacks and
        Defenses](https://arxiv.org/abs/1705.07204)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> x_adv = r_fgsm(net, torch.rand(2, 4), torch.tensor([0, 1]), eps=0.1, seed=0)
    """
    rng, ball = Stream.of(seed, x), Ball(x, eps, norm)
    first = ball.radius / 2 if alpha is None else torch.full_like(ball.radius, alpha)
    if bool((first > ball.radius).any()) or bool((first < 0).any()):
        raise ValueError(
            f"expected 0 <= alpha <= eps, got alpha={alpha}, eps={eps}; alpha is the random part of eps"
        )
    noise = rng.normal(x.shape[1:], x.dtype)
    moved = ball.project(x + first * ball.steepest(noise, x))
    slope = input_gradient(logits_fn, moved, climb(loss, y, target), repeats=repeats, where="r_fgsm")
    return ball.project(moved + (ball.radius - first) * ball.steepest(slope.gradient, moved))
