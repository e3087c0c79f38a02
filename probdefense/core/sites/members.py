"""The choice between networks."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from probdefense.core.sites.site import EMPTY, Site
from probdefense.nn.members import ALL


@dataclass(frozen=True, eq=False)
class MemberSite(Site):
    """Which of `count` networks answers, each equally often; `path` is the buffer that chooses."""

    path: str = ""
    count: int = 1

    enumerated = True  # a training step trains every member

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Rounds through all members in random order: a multiple of `count` has each equally often."""
        rounds = [torch.randperm(self.count, generator=generator) for _ in range(0, shape[0], self.count)]
        return torch.cat(rounds)[: shape[0]].view(shape)

    def center(self) -> Tensor:
        return torch.tensor([ALL])

    def fill(self, value: Tensor, net: nn.Module, given: Mapping[str, Tensor] = EMPTY) -> dict[str, Tensor]:
        return {self.path: value.reshape(())}
