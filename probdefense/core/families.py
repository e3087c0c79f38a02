r"""Distributions of the elements of a site, as modules, and the divergence between two of them.

A module gives the distribution of one element (or of a flat vector of elements), so that parameters
and buffers move, save and copy with the defense.
"""

import inspect
import math
import warnings
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints, kl_divergence, register_kl
from torch.distributions.utils import broadcast_all

from probdefense.rng import forked


class MultiplicativeLogNormal(dist.TorchDistribution):
    r"""A value times log-normal noise of mean 1, $\theta = \mu\, e^{\sigma \varepsilon - \sigma^2 / 2}$.

    The sign never changes and the mean is $\mu$, so $\sigma$ is relative noise: a standard deviation
    of $\sigma$ means about $100\,\sigma$ percent. Where $\mu = 0$ the noise has nothing to multiply
    and the KL from any density is infinite.

    Args:
        loc: $\mu$, any sign.
        scale: $\sigma$, the standard deviation of $\log |\theta|$.
        validate_args: As in torch.

    Examples:
        >>> q = MultiplicativeLogNormal(torch.tensor([-2.0]), torch.tensor([0.1]))
        >>> bool((q.sample((9,)) < 0).all()), q.mean
        (True, tensor([-2.]))
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None):
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "MultiplicativeLogNormal":
        return type(self)(self.loc.expand(batch_shape), self.scale.expand(batch_shape), validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return self.loc**2 * torch.expm1(self.scale**2)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        eps = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc * torch.exp(self.scale * (eps - self.scale / 2))

    def log_prob(self, value: Tensor) -> Tensor:
        ratio = value / self.loc
        eps = ratio.clamp_min(1e-30).log() / self.scale + self.scale / 2
        density = -(eps**2) / 2 - (self.scale * value.abs()).log() - math.log(2 * math.pi) / 2
        return torch.where(ratio > 0, density, -torch.inf)


@register_kl(MultiplicativeLogNormal, torch.distributions.Normal)
def _kl_multiplicative(q: Any, p: Any) -> Tensor:
    entropy = (2 * math.pi * math.e * q.scale**2).log() / 2 + q.loc.abs().log() - q.scale**2 / 2
    square = q.variance + (q.loc - p.loc) ** 2
    return (2 * math.pi * p.scale**2).log() / 2 + square / (2 * p.scale**2) - entropy


def numbers_of(distribution: Distribution) -> dict[str, Tensor]:
    """The numbers that a distribution was made of, by the name of the argument."""
    known = inspect.signature(type(distribution).__init__).parameters
    names = [name for name in distribution.arg_constraints if name in known]
    if {"probs", "logits"} <= set(names):
        names.remove("probs" if "logits" in distribution.__dict__ else "logits")
    return {name: torch.as_tensor(getattr(distribution, name)).detach() for name in names}


class Fixed(nn.Module):
    """A distribution without trained parameters, kept in buffers so that it moves with its module."""

    function_settings = ("kind",)

    def __init__(self, distribution: Distribution):
        super().__init__()
        if distribution.event_shape or not distribution.arg_constraints:
            raise ValueError(
                f"expected a distribution of single elements, such as Normal or Uniform, got "
                f"{type(distribution).__name__}, which holds others or whole vectors; give its base"
            )
        # The Pyro class of the same name, so that torch's own distributions may be given.
        self.kind: Any = getattr(dist, type(distribution).__name__, type(distribution))
        numbers = numbers_of(distribution)
        self.names = list(numbers)
        for name, number in numbers.items():
            self.register_buffer(name, number.clone())
        self.standard_normal = self._is_standard_normal()
        self.register_load_state_dict_post_hook(_read_anew)

    def _is_standard_normal(self) -> bool:
        """Whether fresh draws are those of ``torch.randn``."""
        return self.kind is dist.Normal and [getattr(self, name).tolist() for name in self.names] == [
            0.0,
            1.0,
        ]

    def forward(self) -> Distribution:
        """The distribution, on the device where the module is."""
        return self.kind(**{name: getattr(self, name) for name in self.names}, validate_args=False)


def _read_anew(module: Fixed, _: Any) -> None:
    """After a load the numbers may be others."""
    module.standard_normal = module._is_standard_normal()


class MeanField(nn.Module):
    r"""Independent elements with trained location and scale, $\sigma = \text{floor} + e^{\rho}$.

    Args:
        loc: Where the locations start, ``(D,)``.
        init_scale: Where every scale starts, above the floor.
        family: ``Normal``, ``Laplace`` or another class of ``(loc, scale)`` with mean ``loc``.
        floor: The smallest scale.
    """

    function_settings = ("kind", "floor")

    def __init__(self, loc: Tensor, init_scale: float, family: Any = dist.Normal, floor: float = 0.0):
        super().__init__()
        self.kind, self.floor = family, floor
        self.loc = nn.Parameter(loc.detach().clone())
        self.log_scale = nn.Parameter(torch.full_like(self.loc, math.log(init_scale - floor)))

    @property
    def scale(self) -> Tensor:
        """The current scales, ``(D,)``."""
        scale = self.log_scale.exp()
        return scale + self.floor if self.floor else scale

    def forward(self) -> Distribution:
        """The distribution of the flat vector, one element each."""
        return self.kind(self.loc, self.scale, validate_args=False)


class Spread(nn.Module):
    """A zero-mean posterior whose trained scale, at least `floor`, starts at `scale`."""

    function_settings = ("kind", "floor")

    def __init__(
        self, shape: tuple[int, ...], family: Any = dist.Normal, floor: float = 0.0, scale: float = 1.0
    ):
        super().__init__()
        self.kind, self.floor = family, floor
        self.log_scale = nn.Parameter(torch.full(shape, scale - floor).log())

    def forward(self) -> Distribution:
        """The distribution of one element, batch shape that of the scale."""
        scale = self.floor + self.log_scale.exp()
        return self.kind(torch.zeros_like(scale), scale, validate_args=False)


def drawn(distribution: Any, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """A draw of a shape that ends in that of the distribution, from torch's global state or a generator.

    Families that take no generator are drawn from the global state, seeded by the generator for a moment.
    """
    kind = type(distribution)
    if generator is not None and kind is dist.Normal:
        like = distribution.loc
        eps = torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
        return torch.addcmul(like, distribution.scale, eps)
    if generator is not None and kind is dist.Bernoulli:
        return torch.bernoulli(distribution.probs.expand(shape), generator=generator)
    seed = None
    if generator is not None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    expanded = distribution.expand(shape)
    with forked(seed, None if generator is None else generator.device):
        return expanded.rsample() if expanded.has_rsample else expanded.sample()


def divergence(q: Distribution, p: Distribution, value: Tensor, name: str) -> Tensor:
    r"""Total $\mathrm{KL}(q \| p)$ over all elements: closed if known, else $\log q - \log p$ at `value`."""
    if type(q) is dist.Normal and type(p) is dist.Normal and p.scale.dim() == 0 and q.loc.dim() == 1:
        return _flat_normal_kl(q, p)
    try:
        return kl_divergence(q, p).sum()
    except NotImplementedError:
        warnings.warn(
            f"KL({type(q).__name__} || {type(p).__name__}) of site {name!r} has no closed form and is "
            "estimated from one draw; expect noise in the reported KL",
            stacklevel=2,
        )
        return q.log_prob(value).sum() - p.log_prob(value).sum()


def _flat_normal_kl(q: Any, p: Any) -> Tensor:
    """KL of a long diagonal Normal from a shared scalar one, by sums that make no temporary."""
    loc = q.loc if p.loc == 0 else q.loc - p.loc
    squares = torch.dot(loc, loc) + torch.dot(q.scale, q.scale)
    logs = q.scale.log().sum() - q.loc.numel() * p.scale.log()
    return squares / (2 * p.scale**2) - logs - q.loc.numel() / 2
