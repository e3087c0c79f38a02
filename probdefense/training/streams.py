"""Where a training draws from: torch's global state, and the generators by which a loader orders its data."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from probdefense.rng import derive, forked


class Streams:
    """All random states that a training moves."""

    def __init__(self, own: list[torch.Generator], device: torch.device):
        self.own, self.device = own, device

    def state(self) -> list[Tensor]:
        """All states now."""
        states = [torch.get_rng_state(), *(generator.get_state() for generator in self.own)]
        return [*states, torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else states

    def restore(self, states: list[Tensor]) -> None:
        """Puts all states back."""
        torch.set_rng_state(states[0])
        for generator, state in zip(self.own, states[1:], strict=False):
            generator.set_state(state)
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[-1], self.device)


@contextmanager
def seeded(seed: int | None, loader: Any, device: torch.device, rank: int = 0) -> Iterator[Streams]:
    """Runs the block from `seed`: global draws and a loader's own; all states are put back afterwards.

    Processes of other ranks draw other numbers.
    """
    own = generators(loader)
    found = [generator.get_state() for generator in own]
    if seed is not None and rank > 0:
        seed = derive(seed, "rank", rank)
    try:
        with forked(seed, device):
            for generator in own if seed is not None else ():
                generator.manual_seed(derive(seed or 0, "loader"))
            yield Streams(own, device)
    finally:
        for generator, state in zip(own, found, strict=True) if seed is not None else ():
            generator.set_state(state)


def generators(loader: Any) -> list[torch.Generator]:
    """The generators that a loader and its samplers order the data by, if they have their own."""
    batched = getattr(loader, "batch_sampler", None)
    owners = [loader, getattr(loader, "sampler", None), batched, getattr(batched, "sampler", None)]
    own = [getattr(owner, "generator", None) for owner in owners]
    return list(dict.fromkeys(generator for generator in own if isinstance(generator, torch.Generator)))
