"""Running a network without consequences: no running statistics, no arithmetic where none is needed."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from probdefense.nn.placeholder import placeholders, recording
from probdefense.rng import forked
from probdefense.types import Inputs


@contextmanager
def held_still(net: nn.Module) -> Iterator[None]:
    """Normalization and Dropout layers in ``eval()`` for the block, everything else as it is."""
    kinds = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    moving = [module for module in net.modules() if module.training and isinstance(module, kinds)]
    for module in moving:
        module.training = False
    try:
        yield
    finally:
        for module in moving:
            module.training = True


@contextmanager
def statistics_kept(net: nn.Module) -> Iterator[None]:
    """What moves running statistics during the block moves copies of them."""
    layers = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    kept = [dict(layer.named_buffers(recurse=False)) for layer in layers]
    try:
        for layer, buffers in zip(layers, kept, strict=True):
            layer._buffers.update({name: buffer.clone() for name, buffer in buffers.items()})
        yield
    finally:
        for layer, buffers in zip(layers, kept, strict=True):
            layer._buffers.update(buffers)


def dry_run(net: nn.Module, x: Inputs, restart: Callable[[], None]) -> None:
    """Runs a network on one example like `x`, on the meta device: no arithmetic, no random numbers.

    A network that cannot run there (it makes tensors of its own) runs once on zeros instead, after a
    call of `restart` to forget what the first attempt left.
    """
    state: dict[str, Tensor] = dict(net.named_parameters()) | dict(net.named_buffers())
    with torch.no_grad(), held_still(net):
        try:
            meta = {name: value.to("meta") for name, value in state.items()}
            functional_call(net, meta, (torch.empty((1, *x.shape[1:]), dtype=x.dtype, device="meta"),))
        except (RuntimeError, NotImplementedError):
            restart()
            with forked(0, x.device), explained(x):
                net(torch.zeros_like(x[:1]))


MISFIT = re.compile("shape|channels|Expected size|must match|should be the same|same dtype|scalar type")
"""What torch says where an input does not fit a layer."""


@contextmanager
def explained(x: Inputs) -> Iterator[None]:
    """Inside the block a network that cannot take `x` says what came and what to do.

    Raises:
        ValueError: the shape or type of `x` does not fit.
    """
    try:
        yield
    except RuntimeError as error:
        if not MISFIT.search(str(error)):
            raise
        came = f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
        raise ValueError(
            f"expected inputs that fit the network, got {came}; check the channels, the image size and the "
            f"dtype (torch: {error})"
        ) from error


def execution_order(net: nn.Module, x: Inputs) -> list[tuple[str, int, torch.Size]]:
    """``(path, use, event shape)`` of every hole as the network meets it, for one example like `x`."""
    holes = placeholders(net)

    def restart() -> None:
        seen.clear()
        for hole in holes.values():
            hole.uses = 0

    with recording(holes) as seen:
        dry_run(net, x, restart)
    return seen


def input_shapes(net: nn.Module, paths: list[str], x: Inputs) -> dict[str, torch.Size]:
    """The event shape that each module receives on an input like `x`, in the order of execution.

    If the network cannot take such an input, the answer covers what ran until it failed.
    """
    met: dict[str, torch.Size] = {}
    handles = [
        net.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: met.setdefault(path, args[0].shape[1:]) and None
        )
        for path in paths
    ]
    try:
        dry_run(net, x, met.clear)
    except (RuntimeError, ValueError, IndexError):
        pass
    finally:
        for handle in handles:
            handle.remove()
    return met
