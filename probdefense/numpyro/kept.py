"""Kept draws as a posterior: what a sampler found, as the random weights of a `Defense`."""

import copy
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from probdefense.core.defense import Defense
from probdefense.core.sites import WeightSite
from probdefense.types import Inputs, Labels


class KeptDraws(dist.TorchDistribution):
    r"""Rows of a table, each equally often: $\frac1K \sum_k \delta_{\theta_k}$, for use by a flat site.

    The last batch axis runs over the elements of one row: they come from the same draw and are not
    independent, which is why there is no density.

    Args:
        rows: ``(draws, elements)``.
        batch_shape: Ends in the number of elements.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real
    has_rsample = False

    def __init__(self, rows: Tensor, batch_shape: torch.Size | None = None):
        self.rows = rows
        super().__init__(rows.shape[1:] if batch_shape is None else batch_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.rows.mean(0).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        return self.rows.var(0).expand(self.batch_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "KeptDraws":
        return KeptDraws(self.rows, torch.Size(batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        leading = torch.Size(sample_shape) + self.batch_shape[:-1]
        return self.rows[torch.randint(len(self.rows), leading, device=self.rows.device)]


class Rows(nn.Module):
    """`KeptDraws` in a buffer, so that they move, save and copy with the defense."""

    rows: Tensor

    def __init__(self, rows: Tensor):
        super().__init__()
        self.register_buffer("rows", rows.detach().clone())

    def forward(self) -> KeptDraws:
        """The distribution of the flat vector."""
        return KeptDraws(self.rows)


class RowsGuide(nn.Module):
    """A guide that samples all its sites from one kept draw, for a user's own model."""

    def __init__(self, draws: Mapping[str, Tensor]):
        super().__init__()
        self.names = list(draws)
        for number, value in enumerate(draws.values()):
            self.register_buffer(f"draws{number}", value.detach().clone())

    def forward(self, x: Inputs, y: Labels | None = None) -> None:
        """Samples every site as a point: the joint draw is one row."""
        draws = [self.get_buffer(f"draws{number}") for number in range(len(self.names))]
        row = int(torch.randint(len(draws[0]), ()))
        for name, value in zip(self.names, draws, strict=True):
            pyro.sample(name, dist.Delta(value[row], event_dim=value.dim() - 1))


def with_kept(defense: Defense, draws: Mapping[str, Tensor]) -> Defense:
    """A copy of a defense whose global sites take their values from kept draws, jointly.

    Args:
        defense: Made of sites, or of a user's own model and guide.
        draws: Values by site, ``(draws, ...)``.
    """
    twin = copy.deepcopy(defense)
    if not twin.sites:
        return Defense(twin.model, RowsGuide(draws))
    replaced = [site for site in twin.sites.values() if site.name in draws]
    weights = [site for site in replaced if isinstance(site, WeightSite)]
    kept = WeightSite(
        name=weights[0].name,
        prior=None,  # there is no density to weigh against one
        posterior=Rows(torch.cat([draws[site.name] for site in weights], dim=1)),
        names=tuple(names for site in weights for names in site.names),
        shapes=tuple(shape for site in weights for shape in site.shapes),
    )
    others = [site for site in twin.sites.values() if site not in replaced]
    return Defense.from_sites(twin.net, [*others, kept], twin.num_data)
