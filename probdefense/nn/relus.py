"""Putting a layer behind every ReLU of a network: modules by hooks, function calls by a mode.

A ReLU that is a module gets a layer of its own. Calls of ``F.relu``, ``torch.relu`` and
``Tensor.relu`` have no place of their own, so one layer at the root follows all of them.
"""

from collections.abc import Callable, Container
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from probdefense.nn.surgery import free_name, insert_after, matching

FUNCTIONAL = "functional"
"""The path that stands for all functional ReLUs of a network."""

FUNCTIONS = frozenset({torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, functional.relu, functional.relu_})

Where = Callable[[str, nn.Module], bool]


def after_relus(
    net: nn.Module,
    name: str,
    make: Callable[[str], nn.Module],
    where: Where | None = None,
    paths: Container[str] | None = None,
) -> None:
    """Runs ``make(path)`` on the output of every ReLU, under `name` inside its module.

    Args:
        net: The network, changed in place.
        name: What the layers are called.
        make: A new layer for a path; ``"functional"`` is the path of all function calls.
        where: Which modules; by default all, and function calls too.
        paths: Which paths, in place of `where`.

    Raises:
        ValueError: no ReLU, now or, where only function calls are possible, in the first forward pass.
    """
    chosen = where if paths is None else lambda path, module: path in paths
    hosts = dict(matching(net, (nn.ReLU,), chosen))
    watched = FUNCTIONAL in paths if paths is not None else where is None and _may_call(net)
    if not hosts and not watched:
        known = ", ".join(path for path, _ in matching(net, (nn.ReLU,))) or "none"
        raise ValueError(
            f"found no ReLU in {type(net).__name__}; looked for nn.ReLU modules (here: {known}) that where "
            "accepts, and for calls of F.relu, torch.relu or Tensor.relu"
        )
    for path, host in hosts.items():
        insert_after(host, name, make(path))
    if watched:
        _watch(net, name, make(FUNCTIONAL), required=not hosts)


class Watch(nn.Module):
    """Holds the layer behind function calls, and knows whether a ReLU module is running."""

    def __init__(self, layer: nn.Module, required: bool):
        super().__init__()
        self.layer, self.required = layer, required
        self.met, self.inside = False, False
        self.modes: list[TorchFunctionMode] = []

    def forward(self, z: Tensor) -> Tensor:
        """The identity, because a Sequential runs it as its last child."""
        return z

    def enter(self, net: nn.Module, args: Any) -> None:
        """Before the network runs."""
        self.inside = False
        self.modes.append(_Follow(self))
        self.modes[-1].__enter__()

    def leave(self, net: nn.Module, args: Any, output: Any) -> None:
        """After it ran, also when it failed; refuses a network in which nothing was found."""
        self.modes.pop().__exit__(None, None, None)
        if self.required and not self.met and output is not None:  # None: the forward pass failed
            raise ValueError(
                f"found no ReLU in {type(net).__name__}; looked for nn.ReLU modules and for calls of "
                "F.relu, torch.relu or Tensor.relu in a forward pass"
            )

    def mark(self, inside: bool, *_: Any) -> None:
        """Before and after a ReLU module runs."""
        self.inside = inside


class _Follow(TorchFunctionMode):
    """While active, functional ReLUs outside ReLU modules are followed by a layer."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function not in FUNCTIONS or self.watch.inside:
            return output
        self.watch.met = True
        return self.watch.layer(output)


def _watch(net: nn.Module, name: str, layer: nn.Module, required: bool) -> None:
    watch = Watch(layer, required)
    for _, module in list(matching(net, (nn.ReLU,))):
        module.register_forward_pre_hook(partial(watch.mark, True))
        module.register_forward_hook(partial(watch.mark, False))
    net.add_module(free_name(net, f"{FUNCTIONAL}_{name}"), watch)
    net.register_forward_pre_hook(watch.enter)
    net.register_forward_hook(watch.leave, always_call=True)


def _may_call(net: nn.Module) -> bool:
    """Whether a forward method of the network may call a ReLU: torch's own layers do not."""
    kinds = {type(module).__module__ for module in net.modules()}
    return any(
        not kind.startswith(("torch.nn.modules", "probdefense.nn")) or kind.endswith("transformer")
        for kind in kinds
    )
