r"""Natural evolution strategies: projected steps along a gradient estimated from answers alone.

Ilyas et al., 2018, [Black-box Adversarial Attacks with Limited Queries and
Information](https://arxiv.org/abs/1804.08598). The gradient of the loss smoothed by a Gaussian needs
only its values, in antithetic pairs; every step then is one of projected gradient descent.

$$ \hat g = \frac1n \sum_{k=1}^n \frac{\ell(x + \sigma u_k) - \ell(x - \sigma u_k)}{2 \sigma} u_k,
   \qquad u_k \sim N(0, I) $$
"""

import math

from probdefense.attacks.tools.border import attack
from probdefense.attacks.tools.queries import (
    PROBES,
    Queries,
    both_ways,
    fitted_width,
    random_directions,
    slope_along,
)
from probdefense.attacks.tools.selection import Goal
from probdefense.logits.losses import margin
from probdefense.ops import Ball
from probdefense.progress import track
from probdefense.rng import Stream
from probdefense.types import Inputs, Labels, LogitsFn, LossFn, Norm, Seed


@attack
def nes(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    eps: float,
    norm: Norm = math.inf,
    step_size: float | None = None,
    sigma: float | None = None,
    num_directions: int = 25,
    max_queries: int = 5000,
    loss: LossFn = margin,
    frozen: bool = False,
    target: Labels | None = None,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""Natural evolution strategies, $x_{t+1} = \Pi(x_t + \alpha\, d(\hat g_t))$, without gradients.

    A random defense is asked for one draw per point: another direction averages noise as well as
    another draw, and the error of the directions besides.

    Args:
        logits_fn: What is attacked.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        eps: Radius in pixels.
        norm: 1, 2 or ``inf``.
        step_size: $\alpha$ in pixels; $2.5\,\epsilon$ over the number of steps by default.
        sigma: Scale of the directions in pixels; by default the step at which the slope stands out
            from the noise of the defense, measured at `x`.
        num_directions: $n$, antithetic pairs per step.
        max_queries: Forward evaluations per example, every draw counting as one.
        loss: What is climbed.
        frozen: Whether the attacker knows the randomness of the defense and holds its draws fixed.
        target: Classes wanted; the loss at them is descended instead.
        seed: An int, one per example, or a generator; fixes every random number of the attack.
        max_batch: Examples at once.

    Returns:
        Points of the ball, ``(batch, *event)``.

    Raises:
        ValueError: bad inputs or settings, or a budget below one step.

    References:
        Ilyas et al., 2018, [Black-box Adversarial Attacks with Limited Queries and
        Information](https://arxiv.org/abs/1804.08598)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> x_adv = nes(net, torch.rand(2, 4), torch.tensor([0, 1]), eps=0.1, max_queries=200)
    """
    rng, ball = Stream.of(seed, x), Ball(x, eps, norm)
    queries = Queries(
        logits_fn,
        x,
        Goal(y, target, loss),
        max_queries,
        num_samples=None if frozen else 1,
        frozen=frozen,
    )
    width = sigma or fitted_width(queries, x, random_directions(rng.normal, PROBES, x))
    num_steps = queries.rounds(2 * num_directions)
    step = 2.5 * ball.radius / num_steps if step_size is None else step_size
    points = x
    for _ in track(range(num_steps), "nes"):
        moves = random_directions(rng.normal, num_directions, x)
        slope = slope_along(*both_ways(queries, points, moves, width), moves, width)
        points = ball.project(points + step * ball.steepest(slope, points))
    return points
