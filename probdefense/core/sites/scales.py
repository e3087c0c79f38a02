"""Scales of a prior, one per layer, that are random themselves."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from probdefense.core.sites.site import EMPTY, Site


@dataclass(frozen=True, eq=False)
class ScaleSite(Site):
    """What the prior of another site depends on; the network does not see it."""

    layers: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return len(self.layers)

    def fill(self, value: Tensor, net: nn.Module, given: Mapping[str, Tensor] = EMPTY) -> dict[str, Tensor]:
        return {}
