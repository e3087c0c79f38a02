"""What a network draws by itself in training mode, beside the holes that a defense fills."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from probdefense.nn.passes import NONE, run_on_zeros
from probdefense.types import Inputs

DETERMINISTIC = "_scaled_dot_product"
"""Fused attention is tagged as random whatever its dropout is; with dropout it is not fused."""


class _Draws(TorchDispatchMode):
    """While active, calls a function at every operation that draws random numbers."""

    def __init__(self, noted: Callable[[], None]):
        super().__init__()
        self.noted = noted

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would load its compiler to switch it off here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        random = torch.Tag.nondeterministic_seeded in func.tags
        if random and not func.__name__.startswith(DETERMINISTIC):
            self.noted()
        return func(*args, **(kwargs or {}))


def random_in_training(net: nn.Module, x: Inputs, given: Mapping[str, Tensor] = NONE) -> list[str]:
    """The modules, as ``path (class)``, in which random numbers are drawn in training mode.

    One black example like `x` runs: dropout draws nothing for an empty batch.
    """
    found: dict[str, None] = {}
    running = [net]
    names = {module: f"{path} ({type(module).__name__})".lstrip() for path, module in net.named_modules()}

    def note() -> None:
        found[names[running[-1]]] = None

    with torch.no_grad(), _training(net), _followed(net, running), _Draws(note):
        run_on_zeros(net, x, given)
    return list(found)


@contextmanager
def _training(net: nn.Module) -> Iterator[None]:
    """Training mode for the block, of all but normalization, which one example cannot train."""
    modes = {module: module.training for module in net.modules()}
    for module in modes:
        module.training = not isinstance(module, nn.modules.batchnorm._NormBase)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _followed(net: nn.Module, running: list[nn.Module]) -> Iterator[None]:
    """Keeps the stack of the modules that are running."""
    handles = []
    for module in net.modules():
        handles.append(module.register_forward_pre_hook(partial(_enter, running)))
        handles.append(module.register_forward_hook(partial(_leave, running), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(running: list[nn.Module], module: nn.Module, _: Any) -> None:
    running.append(module)


def _leave(running: list[nn.Module], *_: Any) -> None:
    running.pop()
