r"""Simultaneous perturbation: Adam on a slope from all pixels moved at once, up or down.

Uesato et al., 2018, [Adversarial Risk and the Dangers of Evaluating Against Weak
Attacks](https://arxiv.org/abs/1802.05666). As `nes`, with directions of fair signs, which move every
pixel by the same amount, and with Adam's step instead of the steepest one.

$$ \hat g = \frac1n \sum_{k=1}^n \frac{\ell(x + h v_k) - \ell(x - h v_k)}{2 h} v_k,
   \qquad v_k \in \{-1, 1\}^d $$
"""

import math

from probdefense.attacks.tools.adam import Adam
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
def spsa(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    eps: float,
    norm: Norm = math.inf,
    learning_rate: float | None = None,
    h: float | None = None,
    num_directions: int = 64,
    max_queries: int = 5000,
    loss: LossFn = margin,
    frozen: bool = False,
    target: Labels | None = None,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""Simultaneous perturbation stochastic approximation inside a projected Adam.

    A random defense is asked for one draw per point, as in `nes`.

    Args:
        logits_fn: What is attacked.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        eps: Radius in pixels.
        norm: 1, 2 or ``inf``.
        learning_rate: Of Adam, in pixels; the way across the ball over the number of steps by default.
        h: Step of the differences in pixels; by default the one at which the slope stands out from
            the noise of the defense, measured at `x`.
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
        Uesato et al., 2018, [Adversarial Risk and the Dangers of Evaluating Against Weak
        Attacks](https://arxiv.org/abs/1802.05666)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> x_adv = spsa(net, torch.rand(2, 4), torch.tensor([0, 1]), eps=0.1, max_queries=400)
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
    width = h or fitted_width(queries, x, random_directions(rng.sign, PROBES, x))
    num_steps = queries.rounds(2 * num_directions)
    across = ball.radius / x[0].numel() ** (1 / norm)
    rate = 2.5 * across / num_steps if learning_rate is None else learning_rate
    points, adam = x, Adam(x)
    for _ in track(range(num_steps), "spsa"):
        moves = random_directions(rng.sign, num_directions, x)
        slope = slope_along(*both_ways(queries, points, moves, width), moves, width)
        points = ball.project(points + rate * adam.step(slope))
    return points
