r"""Square attack: random search by squares of one color.

Andriushchenko et al., 2020, [Square Attack](https://arxiv.org/abs/1912.00049). A candidate changes
the perturbation inside a randomly placed square, to a corner of the ball (l-inf) or by moving energy
from one square to another (L2), and replaces the incumbent if the loss is larger. Squares shrink as
the budget is spent.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from probdefense.attacks.tools.border import attack
from probdefense.attacks.tools.queries import Queries
from probdefense.attacks.tools.selection import Goal
from probdefense.logits.losses import margin
from probdefense.ops import Ball
from probdefense.progress import track
from probdefense.rng import Stream
from probdefense.types import Inputs, Labels, LogitsFn, LossFn, Norm, Seed

HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
"""Shares of the budget after which the area of the squares is halved."""

NOISY_RIVALS = 7
"""Candidates per step on a random defense."""

NOISY_STEPS = 32
"""Steps beyond which a budget buys surer answers on a random defense: noise would choose among more."""


@attack
def square(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    eps: float,
    norm: Norm = math.inf,
    max_queries: int = 5000,
    area: float = 0.8,
    loss: LossFn = margin,
    frozen: bool = False,
    target: Labels | None = None,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""Square attack, $x_{t+1} = \arg\max_{x' \in \{x_t, \Pi(x_t + \text{square})\}} \ell(x')$.

    On a random defense every step asks about the incumbent again, beside seven candidates: a lucky
    answer would never be beaten if it were remembered, and the best of several stands out from noise. A
    larger budget goes into more draws per answer, as soon as it pays for 32 steps twice.

    Args:
        logits_fn: What is attacked.
        x: ``(batch, *event)`` in [0, 1]; events of other than three axes are seen as rows of pixels.
        y: True classes, ``(batch,)``.
        eps: Radius in pixels.
        norm: 2 or ``inf``.
        max_queries: Forward evaluations per example, every draw counting as one.
        area: Share of the image that the first squares cover.
        loss: What is climbed, averaged over the draws of an answer.
        frozen: Whether the attacker knows the randomness of the defense and holds its draws fixed.
        target: Classes wanted; the loss at them is descended instead.
        seed: An int, one per example, or a generator; fixes every random number of the attack.
        max_batch: Examples at once.

    Returns:
        Points of the ball, ``(batch, *event)``.

    Raises:
        ValueError: bad inputs or settings, L1, or a budget below one step.

    References:
        Andriushchenko et al., 2020, [Square Attack: a query-efficient black-box adversarial attack
        via random search](https://arxiv.org/abs/1912.00049)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> x_adv = square(net, torch.rand(2, 4), torch.tensor([0, 1]), eps=0.1, max_queries=50)
    """
    if norm not in MOVES:
        raise ValueError(f"expected norm 2 or math.inf for square, got {norm!r}; take another attack for L1")
    rng, ball = Stream.of(seed, x), Ball(x, eps, norm)
    queries = Queries(logits_fn, x, Goal(y, target, loss), max_queries, frozen=frozen)
    rivals = NOISY_RIVALS if queries.stochastic else 1
    best = ball.project(x + _start(ball, rng).view_as(x))
    value = queries.values(best.unsqueeze(0))
    num_steps = queries.rounds(rivals + int(queries.stochastic))
    answers = max(1, num_steps // NOISY_STEPS) if queries.stochastic else 1
    num_steps //= answers
    for number in track(range(num_steps), "square"):
        share = area / 2 ** sum(number > limit * num_steps for limit in HALVINGS)
        delta = _planes(best - x)
        moved = [MOVES[norm](delta, ball, share, rng).view_as(x) for _ in range(rivals)]
        points = torch.stack([best, *(ball.project(x + move) for move in moved)])
        asked = points if queries.stochastic else points[1:]
        fresh = torch.stack([queries.values(asked) for _ in range(answers)]).mean(0)
        value, winner = (fresh if queries.stochastic else torch.cat([value, fresh])).max(0, keepdim=True)
        best = points[winner[0], torch.arange(len(x), device=x.device)]
    return best


def _start(ball: Ball, rng: Stream) -> Tensor:
    """A first perturbation: stripes (l-inf) or a board of five by five fields (L2), of random signs."""
    channels, height, width = _planes(ball.x).shape[1:]
    fields = (1, width) if ball.norm == math.inf else (min(5, height), min(5, width))
    signs = rng.sign((channels, *fields), ball.x.dtype)
    return interpolate(signs, (height, width)) * _planes(ball.radius)


def _paint(delta: Tensor, ball: Ball, share: float, rng: Stream) -> Tensor:
    """The perturbation with a window at a corner of the l-inf ball, one sign per channel."""
    color = rng.sign((delta.shape[1], 1, 1), delta.dtype) * _planes(ball.radius)
    return torch.where(_window(delta, _sides(delta, share), rng)[0], color, delta)


def _gather(delta: Tensor, ball: Ball, share: float, rng: Stream) -> Tensor:
    """The perturbation with the energy of two windows, and what is unused, in the first of them."""
    sides = _sides(delta, share, least=3)
    first, rows, columns = _window(delta, sides, rng)
    either = first | _window(delta, sides, rng)[0]
    bump = _two_bumps(*sides).to(delta)[rows.unsqueeze(2), columns.unsqueeze(1)].unsqueeze(1)
    bump = bump * rng.sign((delta.shape[1], 1, 1), delta.dtype)
    inside = torch.where(first, bump + _unit(delta * first), 0.0)
    unused = (_planes(ball.radius) ** 2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp_min(0.0)
    energy = (delta * either).square().sum((2, 3), keepdim=True) + unused / delta.shape[1]
    return torch.where(either, 0.0, delta) + _unit(inside) * energy.sqrt()


MOVES: dict[float, Callable[[Tensor, Ball, float, Stream], Tensor]] = {math.inf: _paint, 2: _gather}


def _sides(delta: Tensor, share: float, least: int = 1) -> tuple[int, int]:
    """Height and width of a window that covers a share of the image, as square as it can be."""
    height, width = delta.shape[2:]
    tall = min(height, max(least, round(math.sqrt(share * height * width))))
    return tall, min(width, max(least, round(share * height * width / tall)))


def _window(delta: Tensor, sides: tuple[int, int], rng: Stream) -> tuple[Tensor, Tensor, Tensor]:
    """A random window per example: where it is, and the row and column in it of every pixel."""
    places = []
    for size, side in zip(delta.shape[2:], sides, strict=True):
        corner = rng.integers(size - side + 1)
        places.append(torch.arange(size, device=delta.device) - corner.unsqueeze(1))
    (rows, columns), (tall, wide) = places, sides
    inside = ((rows >= 0) & (rows < tall)).unsqueeze(2) & ((columns >= 0) & (columns < wide)).unsqueeze(1)
    return inside.unsqueeze(1), rows.clamp(0, tall - 1), columns.clamp(0, wide - 1)


def _two_bumps(height: int, width: int) -> Tensor:
    """A pyramid and its negative side by side, of unit norm."""
    left = width // 2
    pattern = torch.cat([_pyramid(height, left), -_pyramid(height, width - left)], dim=1)
    return pattern / pattern.norm()


def _pyramid(height: int, width: int) -> Tensor:
    """Steps that grow towards the middle as sums of inverse squares."""
    rows, columns = (torch.arange(n) - (n - 1) / 2 for n in (height, width))
    reach = torch.maximum(rows.abs().unsqueeze(1), columns.abs()).floor().long()
    top = max(height, width) // 2
    steps = (1 / torch.arange(top + 1, 0, -1).float() ** 2).cumsum(0)
    return steps[top - reach]


def _unit(delta: Tensor) -> Tensor:
    """Every channel of every example divided by its L2 norm."""
    return delta / delta.square().sum((2, 3), keepdim=True).sqrt().clamp_min(1e-12)


def _planes(values: Tensor) -> Tensor:
    """Events as images, ``(batch, *event) -> (batch, channels, height, width)``."""
    if values.dim() > 4:
        return values.flatten(1, -3)
    return values.reshape(len(values), *[1] * (4 - values.dim()), *values.shape[1:])
