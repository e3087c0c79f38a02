"""Running a network without consequences: no running statistics, no arithmetic where none is needed."""

import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from probdefense.nn.placeholder import Placeholder, placeholders, recording
from probdefense.nn.relus import FUNCTIONAL, calls_noted
from probdefense.rng import forked
from probdefense.types import Inputs

NONE: Mapping[str, Tensor] = {}

DROPOUT_OFF = {kind.forward for kind in (nn.RNN, nn.LSTM, nn.GRU, nn.MultiheadAttention)}
"""Stay in training mode, with their dropout at 0: cuDNN refuses a backward pass through a recurrent layer in
``eval()``, and attention has a fast path there that ignores hooks."""

TRAINING = {nn.TransformerEncoderLayer.forward}
"""Stay in training mode for the same fast path; what is random in them is in layers of their own."""


NEVER_STILL = DROPOUT_OFF | TRAINING
"""Whose mode must be looked at although they are in ``eval()``."""


@contextmanager
def held_still(net: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block: nothing is random but layers with holes, which keep their mode."""
    before: list[tuple[nn.Module, str, Any]] = []
    modules = modules_of(net)
    owners = [module for module in modules if type(module).train is not nn.Module.train]
    modes = {module: module.training for module in modules} if owners else {}
    try:
        for owner in owners:  # what else such a module switches is known to its own train() alone
            owner.train(False)
        _restore(modes)
        for module in modules:
            if vars(module).get("training") is False and type(module).forward not in NEVER_STILL:
                continue  # as nearly all are in evaluation mode
            for name, value in _still(module).items():
                if (present := getattr(module, name)) != value:
                    before.append((module, name, present))
                    _set(module, name, value)
        yield
    finally:
        for module, name, present in before:
            _set(module, name, present)
        for owner in owners:
            owner.train(modes[owner])
        _restore(modes)


def modules_of(net: nn.Module) -> list[nn.Module]:
    """Every module of a network once, as ``net.modules()``, without the names that make that slow."""
    found, seen = [net], {id(net)}
    for module in found:  # which grows meanwhile
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


@contextmanager
def swapped(net: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters and buffers replaced for the block, by name.

    As torch's ``functional_call``, which looks through the whole network for tied tensors at every call; here
    every name of a tied tensor is given.
    """
    owners: dict[str, nn.Module] = {}
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, tensor in tensors.items():
            path, _, attribute = name.rpartition(".")
            if path not in owners:
                owners[path] = _at(net, path)
            owner = owners[path]
            table: Any = owner._parameters if attribute in owner._parameters else owner._buffers
            before.append((table, attribute, table[attribute]))
            table[attribute] = tensor
        yield
    finally:
        for table, attribute, tensor in reversed(before):
            table[attribute] = tensor


def _at(net: nn.Module, path: str) -> Any:
    """As ``net.get_submodule(path)``, without its checks, which take 10 times longer."""
    for name in path.split(".") if path else ():
        net = net._modules[name]  # type: ignore[assignment]
    return net


def _restore(modes: Mapping[nn.Module, bool]) -> None:
    """Puts every module into its mode, without calling its ``train``."""
    for module, training in modes.items():
        _set(module, "training", training)


def _set(module: nn.Module, name: str, value: Any) -> None:
    """Directly where it is a plain attribute, because the way through nn.Module is 10 times longer."""
    if name in vars(module):
        vars(module)[name] = value
    else:  # of a scripted module, or a property
        setattr(module, name, value)


def _still(module: nn.Module) -> dict[str, Any]:
    """The attributes with which a module is deterministic, unless it is declared random."""
    if any(isinstance(child, Placeholder) for child in module._modules.values()):
        return {}
    forward = getattr(type(module), "forward", None)
    if forward in DROPOUT_OFF:
        return {"training": True, "dropout": 0.0}
    return {"training": forward in TRAINING}


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


def averaging(net: nn.Module) -> set[str]:
    """The normalization layers, by path, whose running statistics are the plain average over batches."""
    kinds = nn.modules.batchnorm._NormBase
    return {path for path, m in net.named_modules() if isinstance(m, kinds) and m.momentum is None}


def dry_run(
    net: nn.Module, x: Inputs, restart: Callable[[], None], given: Mapping[str, Tensor] = NONE
) -> None:
    """Runs a network on no examples like `x`: no arithmetic, and no compiler, as the meta device loads it.

    A network that takes no empty batch (it has ``view(len(x), -1)``) runs once on zeros instead, after
    a call of `restart` to forget what the first attempt left. `given` are the parameters that the
    network lacks.
    """
    with torch.no_grad(), held_still(net):
        try:
            run_on_nothing(net, x, given)
        except Exception:  # whatever a network says to an empty batch: the run on zeros tells
            restart()
            run_on_zeros(net, x, given)


def run_on_nothing(net: nn.Module, x: Inputs, given: Mapping[str, Tensor] = NONE) -> None:
    """An empty batch like `x` through a network, with a random state of its own."""
    with forked(0, x.device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of averages over nothing
        functional_call(net, dict(given), (x.new_zeros((0, *x.shape[1:])),))


def run_on_zeros(net: nn.Module, x: Inputs, given: Mapping[str, Tensor] = NONE) -> None:
    """One black example like `x` through a network, with a random state of its own."""
    with forked(0, x.device), explained(x):
        functional_call(net, dict(given), (x.new_zeros((1, *x.shape[1:])),))


MISFIT = re.compile(
    r"shape|channels|Expected size|must match|should be the same|should contain|same dtype"
    r"|scalar type|[Ee]xpected \dD|Expected \d+, got|expecting embedding dimension"
)
"""What torch says where an input does not fit a layer."""


@contextmanager
def explained(x: Inputs) -> Iterator[None]:
    """Inside the block a network that cannot take `x` says what came and what to do.

    Raises:
        ValueError: the shape or type of `x` does not fit.
    """
    try:
        yield
    except (RuntimeError, ValueError, AssertionError) as error:
        if not MISFIT.search(str(error)):
            raise
        came = f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
        raise ValueError(
            f"expected inputs that fit the network, got {came}; check the channels, the image size and the "
            f"dtype (torch: {error})"
        ) from error


def execution_order(
    net: nn.Module, x: Inputs, given: Mapping[str, Tensor] = NONE
) -> list[tuple[str, int, torch.Size]]:
    """``(path, use, event shape)`` of every hole as the network meets it, for one example like `x`."""
    holes = placeholders(net)

    def restart() -> None:
        seen.clear()
        for hole in holes.values():
            hole.uses = 0

    with recording(holes) as seen:
        dry_run(net, x, restart, given)
    return seen


@contextmanager
def inputs_seen(net: nn.Module, paths: Collection[str]) -> Iterator[dict[str, torch.Size | None]]:
    """Collects the event shape of the first input of every module that runs; None if it is no tensor.

    The path of functional ReLUs (`probdefense.nn.relus`) may be among them.
    """
    met: dict[str, torch.Size | None] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = next(iter((*args, *kwargs.values())), None)
            met.setdefault(path, first.shape[1:] if isinstance(first, Tensor) else None)

        return hook

    with ExitStack() as stack:
        for path in paths:
            if path == FUNCTIONAL:
                stack.enter_context(calls_noted(net, lambda z: note(FUNCTIONAL)(net, (z,), {})))
            else:
                hook = net.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True)
                stack.callback(hook.remove)
        yield met


def input_shapes(
    net: nn.Module, paths: Collection[str], x: Inputs, given: Mapping[str, Tensor] = NONE
) -> dict[str, torch.Size | None]:
    """The event shape that each module receives on an input like `x`, in the order of execution.

    Raises:
        ValueError: the network cannot take such an input.
    """
    with inputs_seen(net, paths) as met:
        dry_run(net, x, met.clear, given)
    return met
