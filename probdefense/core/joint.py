"""Priors of any shape, mixtures, masked, transformed and correlated ones, as one distribution of a vector.

Such a distribution is nested: it holds other distributions, transforms and tensors. Its tensors become
buffers, so that it moves and saves with the defense, and a copy is filled with them when it is asked for.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints
from torch.distributions.transforms import _InverseTransform

FORGOTTEN: dict[str, Any] = {"_inv": None, "_cached_x_y": (None, None), "log_scale": None}
"""What a transform remembers: its inverse, which holds it in turn, and its last call; and what a posterior
remembers of how its scale was made."""

POINTS = (-1e30, -1.0, 0.0, 1.0, 1e30)
"""Values that a distribution of any real number must allow."""


class Flat(dist.TorchDistribution):
    """A distribution of tensors of one shape as one of flat vectors, one event each.

    Args:
        inner: Of which batch and event shape together make up `shape`, or can be expanded to it.
        shape: Of the tensor.
        batch_shape: Of independent copies.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, inner: Distribution, shape: tuple[int, ...], batch_shape: tuple[int, ...] = ()):
        self.inner, self.shape_of_one = inner, torch.Size(shape)
        own = self.shape_of_one[: len(shape) - len(inner.event_shape)]
        self.filled = inner.expand(torch.Size(batch_shape) + own)
        super().__init__(torch.Size(batch_shape), torch.Size([math.prod(shape)]), validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.inner.has_rsample

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Flat":
        return Flat(self.inner, self.shape_of_one, torch.Size(batch_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        value = self.filled.sample(torch.Size(sample_shape))
        return value.reshape(self._extended_shape(torch.Size(sample_shape)))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        value = self.filled.rsample(torch.Size(sample_shape))
        return value.reshape(self._extended_shape(torch.Size(sample_shape)))

    @property
    def mean(self) -> Tensor:
        return self.filled.mean.reshape(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        return self.filled.variance.reshape(self._extended_shape())

    def log_prob(self, value: Tensor) -> Tensor:
        density = self.filled.log_prob(value.unflatten(-1, self.shape_of_one))
        return density.flatten(value.dim() - 1).sum(-1) if density.dim() >= value.dim() else density


class Joint(nn.Module):
    """A nested distribution of the elements of a flat vector; its tensors are buffers."""

    function_settings = ("structure",)

    def __init__(self, distribution: Distribution, shape: tuple[int, ...]):
        super().__init__()
        self.structure = _structure(distribution)
        numbers: list[Tensor] = []
        self.template, self.shape = copied(distribution, lambda tensor: _kept(tensor, numbers)), shape
        for place, number in enumerate(numbers):
            self.register_buffer(f"number_{place}", number)

    def forward(self) -> Flat:
        """The distribution, on the device where the module is."""
        numbers = iter(self.buffers())
        return Flat(copied(self.template, lambda _: next(numbers)), self.shape)


def _structure(thing: Any) -> str:
    """The kinds of distributions and transforms that a nested one is made of."""
    if isinstance(thing, _InverseTransform):
        return f"Inverse({_structure(thing._inv)})"
    if isinstance(thing, list | tuple):
        return ", ".join(filter(None, map(_structure, thing)))
    if isinstance(thing, Distribution | Transform):
        inner = [value for name, value in vars(thing).items() if name not in FORGOTTEN]
        return f"{type(thing).__name__}({_structure(inner)})"
    return ""


def is_nested(distribution: Distribution) -> bool:
    """Whether a distribution cannot be made anew from numbers of one element each."""
    return bool(distribution.event_shape) or not distribution.arg_constraints


def fits(distribution: Distribution, shape: torch.Size) -> bool:
    """Whether a distribution is one of single elements, of tensors of that shape, or of flat ones."""
    event = distribution.event_shape
    if event == (shape.numel(),) and not distribution.batch_shape:
        return True
    rows = shape[: len(shape) - len(event)]
    if len(event) > len(shape) or event != shape[len(rows) :] or len(distribution.batch_shape) > len(rows):
        return False
    sizes = zip(reversed(distribution.batch_shape), reversed(rows), strict=False)
    return all(mine in (1, other) for mine, other in sizes)


def joint_shape(distribution: Distribution, shape: torch.Size, size: int) -> tuple[int, ...]:
    """The shape in which a nested distribution sees a flat vector of `size` elements."""
    if not distribution.batch_shape + distribution.event_shape:
        return (size,)
    flat = distribution.event_shape == (size,) and not distribution.batch_shape
    return (size,) if flat else tuple(shape)


def allows_all(distribution: Distribution) -> bool:
    """Whether every real number is in the support."""
    shape = distribution.batch_shape + distribution.event_shape
    points = torch.tensor(POINTS).view(-1, *[1] * len(shape)).expand(-1, *shape)
    support: Any = distribution.support
    return bool(support.check(points).all())


def _kept(tensor: Tensor, into: list[Tensor]) -> Tensor:
    into.append(tensor.detach().clone())
    return into[-1]


DERIVED = ("covariance_matrix", "precision_matrix", "scale_tril")
"""Of a correlated normal, from its factor."""


def copied(thing: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of distributions and transforms, with every tensor changed, in a fixed order."""
    if isinstance(thing, Tensor):
        return change(thing)
    if isinstance(thing, list | tuple) and not isinstance(thing, torch.Size):
        return type(thing)(copied(part, change) for part in thing)
    if isinstance(thing, _InverseTransform):
        return copied(thing._inv, change).inv
    if isinstance(thing, Distribution | Transform):
        twin = copy.copy(thing)
        derived = () if "_unbroadcasted_scale_tril" not in vars(thing) else DERIVED
        for name, value in vars(thing).items():
            if name in derived:  # computed on demand: whether somebody asked must not matter
                continue
            twin.__dict__[name] = FORGOTTEN[name] if name in FORGOTTEN else copied(value, change)
        return twin
    return thing
