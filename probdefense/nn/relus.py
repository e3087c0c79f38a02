"""Putting a layer behind every ReLU of a network: modules by hooks, function calls by a mode.

A ReLU that is a module gets a layer of its own. Calls of ``F.relu``, ``torch.relu`` and
``Tensor.relu`` have no place of their own, so one layer at the root follows all of them.
"""

from collections.abc import Callable, Collection, Container, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from probdefense.nn.surgery import free_name, insert_after, matching

FUNCTIONAL = "functional"
"""The path that stands for all functional ReLUs of a network."""

RELUS = (nn.ReLU, nn.ReLU6)

FUNCTIONS = frozenset(
    {torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
    | {functional.relu, functional.relu_, functional.relu6}
)

Where = Callable[[str, nn.Module], bool]


def relu_paths(net: nn.Module, where: Where | None = None, paths: Container[str] | None = None) -> list[str]:
    """Where a network may have ReLUs; ``"functional"`` is the path of all function calls.

    Args:
        net: The network.
        where: Which modules; by default all, and function calls too.
        paths: Which paths, in place of `where`.

    Raises:
        ValueError: no ReLU.
    """
    chosen = where if paths is None else lambda path, module: path in paths
    hosts = [path for path, _ in matching(net, RELUS, chosen)]
    watched = FUNCTIONAL in paths if paths is not None else where is None and _may_call(net)
    if not hosts and not watched:
        known = ", ".join(path for path, _ in matching(net, RELUS)) or "none"
        raise ValueError(
            f"expected a ReLU, found no ReLU in {type(net).__name__}; looked for nn.ReLU modules (here: "
            f"{known}) that where "
            "accepts, and for calls of F.relu, torch.relu or Tensor.relu"
        )
    return [*hosts, *([FUNCTIONAL] if watched else [])]


def after_relus(net: nn.Module, name: str, make: Callable[[str], nn.Module], paths: Collection[str]) -> None:
    """Runs ``make(path)`` on the output of the ReLUs at `paths`, under `name` inside their modules.

    Raises:
        ValueError: in the first forward pass, where only function calls were possible and there are none.
    """
    for path in paths:
        if path == FUNCTIONAL:
            _watch(net, name, make(FUNCTIONAL), required=len(paths) == 1)
        else:
            insert_after(net.get_submodule(path), name, make(path))


@contextmanager
def calls_noted(net: nn.Module, note: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside the block `note` sees the output of every functional ReLU outside ReLU modules."""
    watch = Watch(nn.Identity(), required=False)
    watch.layer.register_forward_pre_hook(lambda _, args: note(args[0]))
    handles = _mark(net, watch)
    try:
        with _Follow(watch):
            yield
    finally:
        for handle in handles:
            handle.remove()


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
    _mark(net, watch)
    net.add_module(free_name(net, f"{FUNCTIONAL}_{name}"), watch)
    net.register_forward_pre_hook(watch.enter)
    net.register_forward_hook(watch.leave, always_call=True)


def _mark(net: nn.Module, watch: Watch) -> list[RemovableHandle]:
    handles = []
    for _, module in matching(net, RELUS):
        handles.append(module.register_forward_pre_hook(partial(watch.mark, True)))
        handles.append(module.register_forward_hook(partial(watch.mark, False)))
    return handles


def _may_call(net: nn.Module) -> bool:
    """Whether a forward method of the network may call a ReLU: torch's own layers do not."""
    kinds = {type(module).__module__ for module in net.modules()}
    return any(
        not kind.startswith(("torch.nn.modules", "probdefense.nn")) or kind.endswith("transformer")
        for kind in kinds
    )
