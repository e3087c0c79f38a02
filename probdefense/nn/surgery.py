"""Putting layers into a trained network by hooks, so that every parameter keeps its name."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn


def insert_before(host: nn.Module, name: str, layer: nn.Module, *, first: bool = False) -> str:
    """Runs `layer` on the first input of `host`, `first` of all hooks or last; returns its name there."""
    name = free_name(host, name)
    if _runs_children(host):
        children = dict(host._modules)
        host._modules.clear()
        host._modules.update({name: layer, **children})
        return name
    host.add_module(name, layer)
    host.register_forward_pre_hook(partial(_run_before, name), prepend=first, with_kwargs=True)
    return name


def insert_after(host: nn.Module, name: str, layer: nn.Module) -> str:
    """Runs `layer` on the output of `host`; returns the name it got inside the host."""
    name = free_name(host, name)
    host.add_module(name, layer)
    if not _runs_children(host):
        host.register_forward_hook(partial(_run_after, name))
    return name


def insert_at_input(net: nn.Module, name: str, layer: nn.Module) -> str:
    """Runs `layer` on the raw input of a network, before anything else sees it."""
    return insert_before(net, name, layer, first=True)


def _runs_children(host: nn.Module) -> bool:
    """Whether a module runs every child in order, so that a new child needs no hook."""
    return type(host).forward is nn.Sequential.forward


def reads_raw_input(net: nn.Module, layer: nn.Module) -> bool:
    """Whether the whole network sees its input through `layer` alone, by construction.

    A hook that is not ours may hand on the raw input, or change it before the layer does.
    """
    if any(map(_foreign, (net._forward_hooks, layer._forward_hooks, layer._forward_pre_hooks))):
        return False
    if _runs_children(net) and len(net._modules) and not net._forward_pre_hooks:
        first = next(iter(net._modules.values()))
        return first is layer or (first is not None and reads_raw_input(first, layer))
    hook = next(iter(net._forward_pre_hooks.values()), None)
    return isinstance(hook, partial) and hook.func is _run_before and net.get_submodule(hook.args[0]) is layer


def _foreign(hooks: Mapping[int, Any]) -> bool:
    """Whether somebody else hooked himself in."""
    makers = [
        getattr(hook.func if isinstance(hook, partial) else hook, "__module__", "") for hook in hooks.values()
    ]
    return any(not str(maker).startswith("probdefense.") for maker in makers)


def free_name(host: nn.Module, name: str) -> str:
    """The name, or the first of ``name_1``, ``name_2``, ... that the module does not use yet."""
    taken, number = name, 0
    while hasattr(host, taken):
        number += 1
        taken = f"{name}_{number}"
    return taken


def matching(
    net: nn.Module, kinds: tuple[type[nn.Module], ...], where: Callable[[str, nn.Module], bool] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the given kinds, once each, by path, that the predicate accepts."""
    for path, module in net.named_modules():
        if isinstance(module, kinds) and (where is None or where(path, module)):
            yield path, module


def _run_before(
    name: str, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    layer = getattr(host, name)
    if args:
        return (layer(args[0]), *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: layer(kwargs[first])}


def _run_after(name: str, host: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return getattr(host, name)(output)
