"""Weights that are one of several given states: a choice, and the table that it chooses from."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from probdefense.core.families import drawn
from probdefense.core.sites.members import MemberSite
from probdefense.core.sites.site import EMPTY
from probdefense.core.sites.weights import WeightSite

LARGE = 2**30
"""Bytes from which a table stays on disk, and is shared by copies of its defense."""


class Table(nn.Module):
    """Rows of weights with their probabilities; a last row holds the mean of the others.

    Args:
        rows: ``(K + 1, D)``.
        weights: ``(K,)``, which sum to 1.
        chains: How many chains the rows belong to, one after the other.
    """

    rows: Tensor
    weights: Tensor
    function_settings = ("chains",)

    def __init__(self, rows: Tensor, weights: Tensor, chains: int = 1):
        super().__init__()
        self.chains = chains
        self.register_buffer("rows", rows)
        self.register_buffer("weights", weights.to(rows.dtype))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Table":
        if self.rows.nbytes > LARGE:
            memo[id(self.rows)] = self.rows
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def forward(self) -> Distribution:
        """The choice of a row."""
        return dist.Categorical(probs=self.weights, validate_args=False)


@dataclass(frozen=True, eq=False)
class SampleSite(MemberSite, WeightSite):
    """Which row of a table the parameters (and buffers) of the network are; drawn in rounds."""

    table: Table | None = None
    order: tuple[int, ...] = ()

    enumerated = False  # the rows are fixed: there is nothing to train in each of them

    @property
    def size(self) -> int:
        return 1

    @property
    def rows(self) -> Tensor:
        """The table, ``(K + 1, D)``."""
        assert self.table is not None
        return self.table.rows

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Systematic draws in random order: equal weights come equally often, none twice before all came."""
        count = shape[0]
        if self.order:
            return torch.tensor(self.order)[self._places(count)].view(shape)
        if count == 1 and generator is None:  # as Pyro draws it
            return drawn(self.distribution("posterior"), shape)
        assert self.table is not None
        shuffled = torch.randperm(self.count, generator=generator)
        ends = self.table.weights.cpu().double()[shuffled].cumsum(0)
        start = torch.rand((), generator=generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
        steps = (torch.arange(count, dtype=torch.float64) + start) / count * ends[-1]
        found = shuffled[torch.searchsorted(ends, steps).clamp_max(self.count - 1)]
        return found[torch.randperm(count, generator=generator)].view(shape)

    def _places(self, count: int) -> Tensor:
        """So many places of the order, evenly spaced; more than there are go round."""
        if count > len(self.order):
            return torch.arange(count) % len(self.order)
        return torch.linspace(0, len(self.order) - 1, count).round().long()

    def center(self) -> Tensor:
        return torch.tensor([self.count], device=self.rows.device)

    def moments(self) -> tuple[Tensor, Tensor]:
        assert self.table is not None
        given, mean = self.rows[:-1], self.rows[-1]
        spread = (self.table.weights.unsqueeze(1) * (given - mean).square()).sum(0)
        return mean, spread

    def fill(self, value: Tensor, net: nn.Module, given: Mapping[str, Tensor] = EMPTY) -> dict[str, Tensor]:
        row = self.rows.index_select(0, value.reshape(1).to(self.rows.device))[0]
        return super(MemberSite, self).fill(row, net, given)

    def chain(self, number: int) -> "SampleSite":
        """The same site with the rows of one chain, in their order."""
        assert self.table is not None
        length = self.count // self.table.chains
        return replace(self, order=tuple(range(number * length, (number + 1) * length)))
