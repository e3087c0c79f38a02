r"""Distributions of the elements of a site, as modules, and the divergence between two of them.

A module gives the distribution of one element (or of a flat vector of elements), so that parameters
and buffers move, save and copy with the defense.
"""

import inspect
import math
import warnings
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributions import Distribution, TransformedDistribution, constraints, kl_divergence, register_kl
from torch.distributions.utils import broadcast_all

from probdefense.ops import bounded, unbounded
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


class ScaleMixture(dist.TorchDistribution):
    r"""A wide and a narrow Normal around zero, $\pi N(0, \sigma_1^2) + (1 - \pi) N(0, \sigma_2^2)$.

    Args:
        scale_1: $\sigma_1$.
        scale_2: $\sigma_2$.
        weight: $\pi$ in (0, 1).
        validate_args: As in torch.
    """

    arg_constraints = {  # noqa: RUF012
        "scale_1": constraints.positive,
        "scale_2": constraints.positive,
        "weight": constraints.unit_interval,
    }
    support = constraints.real

    def __init__(self, scale_1: Tensor, scale_2: Tensor, weight: Tensor, validate_args: bool | None = None):
        self.scale_1, self.scale_2, self.weight = broadcast_all(scale_1, scale_2, weight)
        super().__init__(self.weight.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ScaleMixture":
        one, two, weight = (p.expand(batch_shape) for p in (self.scale_1, self.scale_2, self.weight))
        return type(self)(one, two, weight, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return torch.zeros_like(self.weight)

    @property
    def variance(self) -> Tensor:
        return self.weight * self.scale_1**2 + (1 - self.weight) * self.scale_2**2

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        wide = torch.bernoulli(self.weight.expand(shape)).bool()
        eps = torch.randn(shape, dtype=self.weight.dtype, device=self.weight.device)
        return eps * torch.where(wide, self.scale_1, self.scale_2)

    def log_prob(self, value: Tensor) -> Tensor:
        parts = [
            share.log() - (value / scale) ** 2 / 2 - scale.log()
            for share, scale in ((self.weight, self.scale_1), (1 - self.weight, self.scale_2))
        ]
        return torch.logaddexp(*parts) - math.log(2 * math.pi) / 2


class LogNormalScale(dist.LogNormal):
    """A log-normal posterior of scales; its KL from any distribution of positive numbers is a quadrature."""


NODES, NODE_WEIGHTS = (torch.as_tensor(each) for each in np.polynomial.hermite_e.hermegauss(32))
"""Gauss-Hermite points and weights for a standard normal, before they are divided by their sum."""


@register_kl(LogNormalScale, Distribution)
@register_kl(LogNormalScale, TransformedDistribution)
@register_kl(LogNormalScale, torch.distributions.LogNormal)
def _kl_of_scales(q: Any, p: Any) -> Tensor:
    at = NODES.to(q.loc).view(-1, *[1] * q.loc.dim())
    weights = (NODE_WEIGHTS / NODE_WEIGHTS.sum()).to(q.loc).view_as(at)
    entropy = q.loc + (2 * math.pi * math.e * q.scale**2).log() / 2
    return -entropy - (weights * p.log_prob((q.loc + q.scale * at).exp())).sum(0)


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
        self.centered = self._is_centered()
        self.register_load_state_dict_post_hook(_read_anew)

    def _is_standard_normal(self) -> bool:
        """Whether fresh draws are those of ``torch.randn``."""
        return self.kind is dist.Normal and [getattr(self, name).tolist() for name in self.names] == [
            0.0,
            1.0,
        ]

    def _is_centered(self) -> bool:
        """Whether it is one normal around zero for all elements."""
        numbers = [getattr(self, name) for name in self.names]
        return self.kind is dist.Normal and all(n.dim() == 0 for n in numbers) and float(numbers[0]) == 0.0

    def forward(self) -> Distribution:
        """The distribution, on the device where the module is."""
        made = self.kind(**{name: getattr(self, name) for name in self.names}, validate_args=False)
        made.centered = self.centered
        return made


def _read_anew(module: Fixed, _: Any) -> None:
    """After a load the numbers may be others."""
    module.standard_normal, module.centered = module._is_standard_normal(), module._is_centered()


class MeanField(nn.Module):
    r"""Independent elements with trained location and scale, $\sigma = \text{floor} + e^{\rho}$.

    With a ceiling $\sigma = \text{floor} + (\text{ceiling} - \text{floor})\, \mathrm{sigmoid}(\rho)$, which,
    unlike a clamp, has a gradient everywhere.

    Args:
        loc: Where the locations start, ``(D,)``.
        init_scale: Where every scale starts, above the floor and below the ceiling.
        family: ``Normal``, ``Laplace`` or another class of ``(loc, scale)`` with mean ``loc``.
        floor: The smallest scale.
        ceiling: The largest scale; None for none.
    """

    function_settings = ("kind", "floor", "ceiling")

    def __init__(
        self,
        loc: Tensor,
        init_scale: float,
        family: Any = dist.Normal,
        floor: float = 0.0,
        ceiling: float | None = None,
    ):
        super().__init__()
        self.kind, self.floor, self.ceiling = family, floor, ceiling
        self.loc = nn.Parameter(loc.detach().clone())
        self.log_scale = nn.Parameter(torch.full_like(self.loc, unbounded(init_scale, floor, ceiling)))

    @property
    def scale(self) -> Tensor:
        """The current scales, ``(D,)``."""
        return bounded(self.log_scale, self.floor, self.ceiling)

    def forward(self) -> Distribution:
        """The distribution of the flat vector, one element each."""
        made = self.kind(self.loc, self.scale, validate_args=False)
        if not self.floor and self.ceiling is None:
            made.log_scale = self.log_scale  # so that nobody takes the log of its exponential
        return made


class _Drawn(torch.autograd.Function):
    r"""$\mu + e^\rho \varepsilon$ and its KL from $N(0, \sigma^2)$, by one exp and few passes."""

    @staticmethod
    def forward(
        ctx: Any, loc: Tensor, log_scale: Tensor, eps: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        scale = log_scale.exp()
        ctx.save_for_backward(loc, scale, eps, sigma)
        squares = torch.dot(loc, loc) + torch.dot(scale, scale)
        kl = squares / (2 * sigma**2) - log_scale.sum() + loc.numel() * (sigma.log() - 0.5)
        return torch.addcmul(loc, scale, eps), kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, of_kl: Tensor) -> tuple[Tensor, Tensor, None, None]:
        loc, scale, eps, sigma = ctx.saved_tensors
        pull = of_kl / sigma**2
        of_scale = (scale * pull).addcmul_(slope, eps)  # in place: fresh pages cost as much as the passes
        of_rho = torch.addcmul(-of_kl, scale, of_scale, out=of_scale)
        return torch.addcmul(slope, loc, pull), of_rho, None, None


def drawn_with_kl(
    q: nn.Module | None, p: nn.Module | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor] | None:
    """A draw of a posterior and its KL at once, where there is a short way; None elsewhere."""
    if type(q) is not MeanField or not isinstance(p, Fixed) or not p.centered:
        return None
    if q.kind is not dist.Normal or q.floor or q.ceiling is not None:
        return None
    eps = torch.randn(q.loc.shape, dtype=q.loc.dtype, device=q.loc.device, generator=generator)
    return _Drawn.apply(q.loc, q.log_scale, eps, p.get_buffer("scale"))


def filled(distribution: Any, shape: tuple[int, ...]) -> Any:
    """A distribution of elements, or of whole vectors, expanded to values of a shape."""
    return distribution.expand(shape[: len(shape) - len(distribution.event_shape)])


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
    if kind is dist.Normal:
        like = distribution.loc
        eps = torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
        return torch.addcmul(like, distribution.scale, eps)
    if generator is not None and kind is dist.Bernoulli:
        return torch.bernoulli(distribution.probs.expand(shape), generator=generator)
    seed = None
    if generator is not None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    expanded = filled(distribution, shape)
    with forked(seed, None if generator is None else generator.device):
        return expanded.rsample() if expanded.has_rsample else expanded.sample()


SYMMETRIC = ("Normal", "Laplace", "Cauchy", "StudentT", "MultivariateNormal", "LowRankNormal")
"""Families that are symmetric about ``loc``, by the name of the class."""


def mirrored(distribution: Any, value: Tensor) -> Tensor:
    r"""The reflection of a draw about the location, as likely as the draw; itself where there is none.

    $2\mu - \theta$ for symmetric families, and $\mu^2 e^{-\sigma^2} / \theta$, the noise of the other sign,
    for multiplicative ones. Draws of any other family are shared by a pair.
    """
    if type(distribution).__name__ in SYMMETRIC:
        return 2 * distribution.loc - value
    if isinstance(distribution, torch.distributions.Uniform):
        return distribution.low + distribution.high - value
    if isinstance(distribution, MultiplicativeLogNormal):
        square = distribution.loc.square() * torch.exp(-distribution.scale.square())
        return torch.where(value == 0, value, square / value)
    if isinstance(distribution, torch.distributions.Independent):
        return mirrored(distribution.base_dist, value)
    return value


def divergence(q: Distribution, p: Distribution, value: Tensor, name: str) -> Tensor:
    r"""Total $\mathrm{KL}(q \| p)$ over all elements: closed if known, else $\log q - \log p$ at `value`."""
    if type(q) is dist.Normal and type(p) is dist.Normal and p.scale.dim() == 0 and q.loc.dim() == 1:
        return _flat_normal_kl(q, p)
    try:
        vector = dist.Independent(p.expand(q.event_shape), 1) if q.event_shape and not p.event_shape else p
        return kl_divergence(q, vector).sum()
    except NotImplementedError:
        warnings.warn(
            f"KL({type(q).__name__} || {type(p).__name__}) of site {name!r} has no closed form and is "
            "estimated from one draw; expect noise in the reported KL",
            stacklevel=2,
        )
        return q.log_prob(value).sum() - p.log_prob(value).sum()


def _flat_normal_kl(q: Any, p: Any) -> Tensor:
    """KL of a long diagonal Normal from a shared scalar one, by sums that make no temporary."""
    loc = q.loc if getattr(p, "centered", False) else q.loc - p.loc
    squares = torch.dot(loc, loc) + torch.dot(q.scale, q.scale)
    known = getattr(q, "log_scale", None)
    logs = (q.scale.log() if known is None else known).sum() - q.loc.numel() * p.scale.log()
    return squares / (2 * p.scale**2) - logs - q.loc.numel() / 2
