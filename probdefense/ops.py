"""Arithmetic that knows no model: norms, the threat model as a ball, means in log space."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from probdefense.rng import Stream
from probdefense.types import Inputs, Norm


def log_mean_exp(values: Tensor, dim: int = 0) -> Tensor:
    r"""Logarithm of a mean of exponentials, $\log \frac1S \sum_s e^{v_s}$, without overflow.

    Args:
        values: Any shape; the mean runs over `dim`.
        dim: The axis of the draws.

    Example:
        >>> log_mean_exp(torch.tensor([1000.0, 1000.0]))
        tensor(1000.)
    """
    return values.logsumexp(dim) - math.log(values.shape[dim])


def per_example(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes ``(batch,)`` to ``(batch, 1, ..., 1)`` so that it broadcasts against `like`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def lp_norm(delta: Tensor, norm: Norm) -> Tensor:
    """The norm of every example's perturbation, ``(batch, *event) -> (batch,)``, in pixels.

    Example:
        >>> lp_norm(torch.tensor([[3.0, -4.0]]), 2)
        tensor([5.])
    """
    return torch.linalg.vector_norm(delta.flatten(1), ord=norm, dim=1)


@dataclass(frozen=True)
class Ball:
    r"""The points an attacker may use: $\{x' : \|x' - x\|_p \le \epsilon,\ x' \in [0, 1]\}$.

    Args:
        x: Centers, ``(batch, *event)``.
        eps: Radius in pixels, one number or one per example ``(batch,)``.
        norm: 1, 2 or ``inf``.

    Example:
        >>> ball = Ball(torch.full((1, 2), 0.9), eps=0.2, norm=math.inf)
        >>> ball.project(torch.tensor([[2.0, 0.5]]))
        tensor([[1.0000, 0.7000]])
    """

    x: Inputs
    eps: float | Tensor
    norm: Norm = math.inf

    @property
    def radius(self) -> Tensor:
        """The radius of every example, shaped to broadcast against ``x``."""
        eps = torch.as_tensor(self.eps, dtype=self.x.dtype, device=self.x.device)
        return per_example(eps.expand(len(self.x)), self.x)

    def take(self, rows: slice | Tensor) -> "Ball":
        """The balls of some of the examples."""
        eps = self.eps[rows] if isinstance(self.eps, Tensor) and self.eps.dim() else self.eps
        return Ball(self.x[rows], eps, self.norm)

    def project(self, points: Tensor) -> Tensor:
        """The allowed point for every given one; points already allowed stay where they are.

        Exact for l-inf and, by one threshold search, for L1 with the box; for L2 the ball comes
        first and the box second, which lands inside both because ``x`` is in the box.
        """
        delta = points - self.x
        if self.norm == math.inf:
            delta = delta.clamp(-self.radius, self.radius)
        elif self.norm == 2:
            size = per_example(lp_norm(delta, 2), delta)
            delta = delta * (self.radius / size.clamp_min(1e-12)).clamp_max(1.0)
        else:
            delta = _l1_in_box(delta, self.x, self.radius)
        return (self.x + delta).clamp(0.0, 1.0)

    def start(self, rng: Stream) -> Tensor:
        """A random point of the ball for every example (uniform before the box clips it)."""
        shape, dtype = self.x.shape[1:], self.x.dtype
        if self.norm == math.inf:
            delta = 2 * rng.uniform(shape, dtype) - 1
        else:
            size = math.prod(shape)
            direction = rng.normal(shape, dtype)
            if self.norm == 1:
                direction = direction.sign() * -rng.uniform(shape, dtype).log()
            direction = direction / per_example(lp_norm(direction, self.norm), direction)
            delta = direction * per_example(rng.uniform((), dtype), direction) ** (1 / size)
        return self.project(self.x + self.radius * delta)

    def steepest(self, gradient: Tensor, points: Tensor) -> Tensor:
        r"""The step of unit norm that climbs fastest, $\arg\max_{\|d\|_p \le 1} \langle g, d \rangle$.

        For L1 the steepest step moves one coordinate; this one spreads it over the 5 % largest
        slopes among the coordinates that the box still lets move.

        Args:
            gradient: ``(batch, *event)``.
            points: Where the gradient was taken, ``(batch, *event)``.
        """
        if self.norm == math.inf:
            return gradient.sign()
        if self.norm == 2:
            return gradient / per_example(lp_norm(gradient, 2), gradient).clamp_min(1e-30)
        stuck = ((points <= 0) & (gradient < 0)) | ((points >= 1) & (gradient > 0))
        slopes = gradient.masked_fill(stuck, 0.0).flatten(1)
        keep = max(1, slopes.shape[1] // 20)
        largest = slopes.abs().topk(keep, dim=1)
        step = torch.zeros_like(slopes).scatter_(1, largest.indices, largest.values.sign())
        step = step * slopes.sign()
        return (step / lp_norm(step, 1).clamp_min(1.0).unsqueeze(1)).view_as(gradient)


def _l1_in_box(delta: Tensor, x: Tensor, radius: Tensor) -> Tensor:
    """Exact projection of ``x + delta`` onto the L1 ball intersected with the box, minus ``x``.

    The answer is ``sign(d) min(max(|d| - t, 0), room)`` with ``room`` the way to the box; its norm
    falls as the threshold ``t`` grows, so ``t`` is found by bisection and made exact by one linear
    solve on the coordinates that are neither zero nor at the box.
    """
    size = delta.abs().flatten(1)
    room = torch.where(delta > 0, 1 - x, x).flatten(1)
    budget = radius.flatten(1)

    def moved(threshold: Tensor) -> Tensor:
        return (size - threshold).clamp_min(0.0).minimum(room)

    low, high = torch.zeros_like(budget), size.amax(1, keepdim=True)
    for _ in range(30):
        middle = (low + high) / 2
        outside = moved(middle).sum(1, keepdim=True) > budget
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    free = (size > high) & (size - high < room)
    boxed = (size - high >= room).to(room.dtype)
    solved = ((size * free).sum(1, keepdim=True) + (room * boxed).sum(1, keepdim=True) - budget) / free.sum(
        1, keepdim=True
    ).clamp_min(1)
    threshold = torch.where(free.any(1, keepdim=True), solved.clamp(low, high), high)
    inside = moved(torch.zeros_like(budget)).sum(1, keepdim=True) <= budget
    return delta.sign() * moved(threshold.masked_fill(inside, 0.0)).view_as(delta)
