"""The network as a pure function of its tensors and inputs, compiled."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from probdefense.types import Inputs


class Compiled:
    """Compiles the network function when it is first called; a copy compiles anew.

    Values of the sites are arguments, so a draw compiles nothing again.

    Args:
        options: Of ``torch.compile``.
    """

    def __init__(self, options: Mapping[str, Any]):
        self.options = dict(options)
        self.function: Callable[..., Tensor] | None = None

    def __call__(self, net: nn.Module, tensors: Mapping[str, Tensor], x: Inputs) -> Tensor:
        """The logits of the network with these tensors, ``(batch, classes)``."""
        if self.function is None:

            def pure(tensors: dict[str, Tensor], x: Inputs) -> Tensor:
                return functional_call(net, tensors, (x,), tie_weights=False)

            self.function = torch.compile(pure, **{"fullgraph": True, **self.options})
        with warnings.catch_warnings():  # torch's tracer looks at gradients of inputs that are no leaves
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")
            return self.function(dict(tensors), x)

    def __reduce__(self) -> tuple[type["Compiled"], tuple[dict[str, Any]]]:
        return Compiled, (self.options,)


def compiled(model: nn.Module, options: Mapping[str, Any]) -> Compiled:
    """What a model of ours calls instead of its network.

    Raises:
        ValueError: a Pyro program of somebody's own, whose network is not known.
    """
    if not hasattr(model, "holes"):
        raise ValueError(
            f"expected a defense made by the builders, got the program {type(model).__name__}, which samples "
            "while it computes; compile the network inside of it with torch.compile"
        )
    return Compiled(options)
