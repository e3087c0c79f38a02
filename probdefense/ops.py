"""Arithmetic that knows no model: norms, the threat model as a ball, means in log space."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from probdefense.rng import Stream
from probdefense.types import Inputs, Norm
from probdefense.validation import watching


def log_mean_exp(values: Tensor, dim: int = 0) -> Tensor:
    r"""Logarithm of a mean of exponentials, $\log \frac1S \sum_s e^{v_s}$, without overflow.

    Args:
        values: Any shape; the mean runs over `dim`.
        dim: The axis of the draws.

    Examples:
        >>> log_mean_exp(torch.tensor([1000.0, 1000.0]))
        tensor(1000.)
    """
    return log_sum_exp(values, dim) - math.log(values.shape[dim])


def log_sum_exp(values: Tensor, dim: int = 0) -> Tensor:
    r"""$\log \sum_s e^{v_s}$; where every term is $-\infty$, so is the sum, with a gradient of zero, not NaN.

    Examples:
        >>> log_sum_exp(torch.tensor([-torch.inf, -torch.inf]))
        tensor(-inf)
    """
    empty = values.isneginf().all(dim, keepdim=True)
    total = values.masked_fill(empty, 0.0).logsumexp(dim)
    return total.masked_fill(empty.squeeze(dim), -torch.inf)


def exact(values: Tensor) -> Tensor:
    """The values in double precision where the device has it: in it the margin of tiny logits survives."""
    return values.float() if values.device.type == "mps" else values.double()


def entropy(log_probs: Tensor) -> Tensor:
    r"""Entropy $-\sum_k p_k \log p_k$ in nats, ``(..., classes) -> (...)``; zero probabilities count 0.

    Examples:
        >>> entropy(torch.tensor([0.5, 0.5, 0.0]).log())
        tensor(0.6931)
    """
    return -torch.where(log_probs.isneginf(), 0.0, log_probs.exp() * log_probs).sum(-1)


def is_class(y: Tensor, num_classes: int) -> Tensor:
    """Which class is the label, bool ``(..., classes)``.

    On a CPU labels beyond the classes are an error; a device is not asked.
    """
    if watching.immediate(y):
        return one_hot(y, num_classes).bool()
    return y.unsqueeze(-1) == torch.arange(num_classes, device=y.device)


def per_example(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes ``(batch,)`` to ``(batch, 1, ..., 1)`` so that it broadcasts against `like`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def annealed(first: float, last: float, progress: float) -> float:
    """Half a cosine wave from `first` at progress 0 to `last` at progress 1.

    Examples:
        >>> [round(annealed(1.0, 0.0, p), 2) for p in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.0]
    """
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def lp_norm(delta: Tensor, norm: Norm) -> Tensor:
    """The norm of every example's perturbation, ``(batch, *event) -> (batch,)``, in pixels.

    Examples:
        >>> lp_norm(torch.tensor([[3.0, -4.0]]), 2)
        tensor([5.])
    """
    return torch.linalg.vector_norm(delta.flatten(1), ord=norm, dim=1)


def movable(gradient: Tensor, points: Tensor) -> Tensor:
    """The gradient without the coordinates at which the box [0, 1] stops a step along it.

    Examples:
        >>> movable(torch.tensor([-1.0, 1.0, 2.0]), torch.tensor([0.0, 0.0, 1.0]))
        tensor([0., 1., 0.])
    """
    return gradient.masked_fill(((points <= 0) & (gradient < 0)) | ((points >= 1) & (gradient > 0)), 0.0)


@dataclass(frozen=True)
class Ball:
    r"""The points an attacker may use: $\{x' : \|x' - x\|_p \le \epsilon,\ x' \in [0, 1]\}$.

    Args:
        x: Centers, ``(batch, *event)``.
        eps: Radius in pixels, one number or one per example ``(batch,)``.
        norm: 1, 2 or ``inf``.

    Examples:
        >>> ball = Ball(torch.full((1, 2), 0.9), eps=0.2, norm=math.inf)
        >>> ball.project(torch.tensor([[2.0, 0.5]]))
        tensor([[1.0000, 0.7000]])
    """

    x: Inputs
    eps: float | Tensor
    norm: Norm = math.inf

    @cached_property
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
        if self.norm == math.inf:
            return points.clamp(*self._bounds)
        delta = points - self.x
        if self.norm == 2:
            size = per_example(lp_norm(delta, 2), delta)
            delta = delta * (self.radius / size.clamp_min(1e-12)).clamp_max(1.0)
        else:
            delta = _l1_in_box(delta, self.x, self.radius)
        return (self.x + delta).clamp(0.0, 1.0)

    @cached_property
    def _bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and highest allowed pixels of the l-inf ball."""
        return (self.x - self.radius).clamp_min(0.0), (self.x + self.radius).clamp_max(1.0)

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

    def steepest(self, gradient: Tensor, points: Tensor, keep: Tensor | None = None) -> Tensor:
        r"""The step of unit norm that climbs fastest, $\arg\max_{\|d\|_p \le 1} \langle g, d \rangle$.

        For L1 and L2 only coordinates that the box still lets move take part: elsewhere the clamp
        would undo the step and waste its length. For L1 the steepest step moves one coordinate; this
        one spreads it over the `keep` largest slopes.

        Args:
            gradient: ``(batch, *event)``.
            points: Where the gradient was taken, ``(batch, *event)``.
            keep: Coordinates that a step of L1 moves, ``(batch,)``; 5 % by default.
        """
        if self.norm == math.inf:
            return gradient.sign()
        gradient = movable(gradient, points)
        if self.norm == 2:
            largest = per_example(lp_norm(gradient, math.inf), gradient)
            gradient = gradient / torch.where(
                largest > 0, largest, 1.0
            )  # squares neither over- nor underflow
            return gradient / per_example(lp_norm(gradient, 2), gradient).clamp_min(1e-30)
        slopes = gradient.flatten(1)
        size = slopes.abs()
        count = slopes.shape[1] // 20 if keep is None else keep.long().clamp_max(slopes.shape[1])
        last = torch.as_tensor(count, device=size.device).clamp_min(1).expand(len(size)) - 1
        least = size.sort(dim=1, descending=True).values.gather(1, last.unsqueeze(1))
        step = slopes.sign() * (size >= least)
        return (step / lp_norm(step, 1).clamp_min(1.0).unsqueeze(1)).view_as(gradient)


def _l1_in_box(delta: Tensor, x: Tensor, radius: Tensor) -> Tensor:
    """Exact projection of ``x + delta`` onto the L1 ball intersected with the box, minus ``x``.

    The answer is ``sign(d) min(max(|d| - t, 0), room)`` with ``room`` the way to the box. As the
    threshold ``t`` falls, coordinate after coordinate starts to move (at ``|d|``) and reaches the box
    (at ``|d| - room``); between these events the norm is linear in ``t``, which gives ``t`` exactly.
    """
    size = delta.abs().flatten(1).double()  # sums over many coordinates meet a small budget
    room = torch.where(delta > 0, 1 - x, x).flatten(1)
    budget = radius.flatten(1)
    events, order = torch.cat([size, size - room], dim=1).sort(dim=1, descending=True)
    change = torch.where(order < size.shape[1], 1.0, -1.0).double()
    moving, total = change.cumsum(1), (change * events).cumsum(1)
    passed = ((total - moving * events) <= budget).sum(1, keepdim=True) - 1
    threshold = (total.gather(1, passed) - budget) / moving.gather(1, passed).clamp_min(1.0)
    moved = (size - threshold.clamp_min(0.0)).clamp_min(0.0).minimum(room)
    return delta.sign() * moved.view_as(delta).to(delta.dtype)


def reach(eps: float | Tensor, norm: Norm, size: int, dtype: torch.dtype | str) -> float | Tensor:
    r"""How long a perturbation of norm $\epsilon$ may measure: the one tolerance of "inside the ball".

    Pixels are rounded to the dtype where the perturbation is added, so the norm of what comes back
    differs from that of what was meant, in every coordinate by up to the dtype's unit $u$:

    $$ \epsilon\, (1 + \max(10^{-5}, u)) + \max(10^{-6}, u\, D^{1/p}) $$

    Args:
        eps: Radius in pixels.
        norm: 1, 2 or ``inf``.
        size: $D$, pixels per example.
        dtype: Of the images, or its name.

    Examples:
        >>> 0.1 < reach(0.1, math.inf, 64, torch.float32) < 0.10001
        True
    """
    unit = torch.finfo(getattr(torch, dtype) if isinstance(dtype, str) else dtype).eps
    return eps * (1 + max(1e-5, unit)) + max(1e-6, unit * size ** (1 / norm))


def rounded_down(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Non-negative double values in another dtype, never larger than they are.

    Examples:
        >>> third = torch.tensor([1 / 3, 0.1], dtype=torch.float64)
        >>> (third - rounded_down(third, torch.float32)).ge(0).tolist()
        [True, True]
    """
    near = values.to(dtype)
    below = torch.nextafter(near, torch.zeros_like(near))
    return torch.where(near.double() > values, below, near)


def bounded(rho: Tensor, floor: float, ceiling: float | None) -> Tensor:
    """The scale of a free parameter, between floor and ceiling.

    Examples:
        >>> bounded(torch.tensor([0.0]), 0.1, None), bounded(torch.tensor([0.0]), 0.0, 0.5)
        (tensor([1.1000]), tensor([0.2500]))
    """
    if ceiling is not None:
        return floor + (ceiling - floor) * rho.sigmoid()
    return rho.exp() + floor if floor else rho.exp()


def unbounded(scale: float, floor: float, ceiling: float | None) -> float:
    """The free parameter of a scale, see `bounded`.

    Examples:
        >>> unbounded(0.25, 0.0, 0.5)
        0.0
    """
    above = scale - floor
    return math.log(above) if ceiling is None else math.log(above / (ceiling - scale))
