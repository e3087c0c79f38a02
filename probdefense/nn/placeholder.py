"""The hole in a network where a random value will stand. Layers hold holes; they never sample."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributions import Distribution


class Placeholder(nn.Module):
    """A named hole for one random value per example, holding a neutral value until it is filled.

    `torch.func.functional_call` fills it by its buffer names: ``value`` for the first time the layer
    runs in a forward pass, ``value1``, ``value2``, ... for later times (a reused layer).

    Args:
        family: Standard distribution of one element, for example ``Normal(0, 1)``.
        neutral: The value of the static base; for noise, the one that leaves the network as it was.
        axes: How many leading axes of an example have values of their own: all by default, 0 for one
            value per example, 1 for one per channel.

    Examples:
        >>> import pyro.distributions as dist
        >>> Placeholder(dist.Normal(0.0, 1.0))(torch.ones(2, 3))
        tensor(0.)
    """

    value: Tensor
    function_settings = ("family", "axes")
    runtime_attributes = ("uses",)  # which change while the network runs

    def __init__(self, family: Distribution, *, neutral: float = 0.0, axes: int | None = None):
        super().__init__()
        self.family, self.axes = family, axes
        self.uses = 0
        self.on_use: Callable[[int, torch.Size], None] | None = None
        self.register_buffer("value", torch.tensor(neutral), persistent=False)

    def buffer_name(self, use: int) -> str:
        """The name under which the value of a use is filled; later uses are registered, as None."""
        name = f"value{use or ''}"
        if name not in self._buffers:
            self.register_buffer(name, None, persistent=False)
        return name

    def forward(self, like: Tensor) -> Tensor:
        """The value of this use, broadcastable against `like` ``(batch, *event)``."""
        use, self.uses = self.uses, self.uses + 1
        if self.on_use is not None:
            own = like.shape[1:][: self.axes]
            self.on_use(use, torch.Size([*own, *[1] * (like.dim() - 1 - len(own))]))
        value = self._buffers.get(f"value{use or ''}")
        return self.value if value is None else value


def placeholders(net: nn.Module) -> dict[str, Placeholder]:
    """Every hole of a network, by path."""
    return {path: module for path, module in net.named_modules() if isinstance(module, Placeholder)}


@contextmanager
def recording(holes: dict[str, Placeholder]) -> Iterator[list[tuple[str, int, torch.Size]]]:
    """Collects ``(path, use, event shape)`` of every hole, in the order of execution."""
    seen: list[tuple[str, int, torch.Size]] = []
    for path, hole in holes.items():
        hole.uses, hole.on_use = 0, partial(_note, seen, path)
    try:
        yield seen
    finally:
        for hole in holes.values():
            hole.uses, hole.on_use = 0, None


def _note(seen: list[tuple[str, int, torch.Size]], path: str, use: int, shape: torch.Size) -> None:
    seen.append((path, use, shape))
