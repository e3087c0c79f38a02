"""What every builder starts from: a copy of the network and of the sites it already has."""

import copy
import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from probdefense.core.defense import Defense
from probdefense.core.sites import Site

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Host(NamedTuple):
    """A copy to work on: the network, its sites so far, and the size of the data set."""

    net: nn.Module
    sites: list[Site]
    num_data: int | None


def host(net_or_defense: nn.Module, num_data: int | None) -> Host:
    """Copies a plain network, or a defense made of sites, so that the original stays as it is.

    Raises:
        TypeError: not a module, or a defense of a user's own model and guide.
        ValueError: two different data-set sizes.
    """
    if not isinstance(net_or_defense, nn.Module):
        raise TypeError(f"expected an nn.Module or a Defense, got {type(net_or_defense).__name__}")
    if not isinstance(net_or_defense, Defense):
        return Host(copy.deepcopy(net_or_defense), [], num_data)
    if not hasattr(net_or_defense.model, "sites"):
        raise TypeError(
            "expected a network or a Defense made by a builder, got a Defense of your own model and "
            "guide; add the noise or the weights to that model instead"
        )
    known = net_or_defense.num_data
    if num_data is not None and known is not None and num_data != known:
        raise ValueError(f"expected num_data={known}, as in the given Defense, got {num_data}")
    twin = copy.deepcopy(net_or_defense)
    return Host(twin.net, list(twin.sites.values()), num_data if num_data is not None else known)


def device_and_dtype(net: nn.Module) -> Tensor:
    """A tensor where, and of the kind, that the network computes with, for ``layer.to(...)``."""
    tensors = itertools.chain(net.parameters(), net.buffers())
    return next((t.detach() for t in tensors if t.is_floating_point()), torch.zeros(()))


def per_channel(layer: nn.Module, side: str = "in") -> tuple[int, ...]:
    """The shape of one value per channel of what a layer receives (``"in"``) or returns (``"out"``)."""
    if isinstance(layer, CONVOLUTIONS):
        return (getattr(layer, f"{side}_channels"), *[1] * len(layer.kernel_size))
    return (getattr(layer, f"{side}_features", 1),)
