"""A guide with correlations between weights: low-rank plus diagonal covariance, with a closed KL."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints, register_kl

from probdefense.core.families import MeanField


class LowRankNormal(dist.TorchDistribution):
    r"""A normal vector with covariance $W W^\top + \mathrm{diag}(d^2)$, one event.

    What needs the density is computed when it is asked for: draws cost $O(Dk)$ and take any $d \ge 0$.

    Args:
        loc: The mean, ``(D,)``.
        scale: $d$, ``(D,)``.
        factor: $W$, ``(D, k)``.
        batch_shape: Of independent copies.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, factor: Tensor, batch_shape: Any = ()):
        self.loc, self.scale, self.factor = loc, scale, factor
        super().__init__(torch.Size(batch_shape), loc.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LowRankNormal":
        return LowRankNormal(self.loc, self.scale, self.factor, batch_shape)

    @property
    def mean(self) -> Tensor:
        return self.loc.expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        return (self.scale**2 + self.factor.square().sum(-1)).expand(self._extended_shape())

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        own, shared = (
            torch.randn((*shape[:-1], size), dtype=self.loc.dtype, device=self.loc.device)
            for size in self.factor.shape
        )
        return torch.addcmul(self.loc, self.scale, own) + shared @ self.factor.T

    def log_det(self) -> Tensor:
        r"""$\log\det\Sigma = \log\det(I + W^\top \mathrm{diag}(d^{-2}) W) + 2 \sum_i \log d_i$."""
        return 2 * (self._root().diagonal().log().sum() + self.scale.log().sum())

    def log_prob(self, value: Tensor) -> Tensor:
        scaled = (value - self.loc) / self.scale
        along = scaled @ (self.factor / self.scale.unsqueeze(-1))
        inner = torch.linalg.solve_triangular(self._root(), along.unsqueeze(-1), upper=False).squeeze(-1)
        square = scaled.square().sum(-1) - inner.square().sum(-1)
        return -(square + self.log_det() + len(self.loc) * math.log(2 * math.pi)) / 2

    def _root(self) -> Tensor:
        """The Cholesky factor of the capacitance, ``(k, k)``."""
        scaled = self.factor / self.scale.unsqueeze(-1)
        inner = scaled.T @ scaled
        return torch.linalg.cholesky(inner + torch.eye(len(inner), dtype=inner.dtype, device=inner.device))


@register_kl(LowRankNormal, torch.distributions.Independent)
def _kl_low_rank(q: Any, p: Any) -> Tensor:
    normal = p.base_dist
    if not isinstance(normal, torch.distributions.Normal):
        raise NotImplementedError
    square = (q.variance + (q.mean - normal.loc) ** 2) / normal.variance
    logs = 2 * normal.scale.log()
    return ((square + logs).expand(q.event_shape).sum(-1) - q.log_det() - len(q.loc)) / 2


class LowRank(MeanField):
    r"""A normal vector with trained mean, scales and factor, $\Sigma = D\,(I + V V^\top)\,D$.

    With $D = \mathrm{diag}(d)$ the factor is relative to the scales, $W = D V$: both then take steps of a
    size that does not depend on the units of the weights.

    Args:
        loc: Where the mean starts, ``(D,)``.
        init_scale: Where every $d$ starts; $V$ starts at random with elements of size 0.1.
        rank: $k$, the columns of $V$.
        floor: The smallest $d$.
        ceiling: The largest $d$; None for none.
    """

    def __init__(self, loc: Tensor, init_scale: float, rank: int, floor: float, ceiling: float | None):
        super().__init__(loc, init_scale, LowRankNormal, floor, ceiling)
        start = torch.randn((loc.numel(), rank), generator=torch.Generator().manual_seed(rank))
        self.factor = nn.Parameter(start.to(loc) / 10)  # at 0 it would have no gradient

    def forward(self) -> Distribution:
        """The distribution of the flat vector, one event."""
        scale = self.scale
        return LowRankNormal(self.loc, scale, scale.unsqueeze(-1) * self.factor)

    def take(self, loc: Tensor, scale: Tensor, factor: Tensor) -> None:
        """Takes given numbers: the mean, $d > 0$ without bounds, and $W$."""
        with torch.no_grad():
            self.loc.copy_(loc)
            self.log_scale.copy_(scale.log())
            self.factor.copy_(factor / scale.unsqueeze(-1))
