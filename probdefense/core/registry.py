"""Builders by name, and the calls of them that made a defense: what a file needs to make it again.

`builder` registers a function from a network (or a `Defense`) to a `Defense` and notes every call on what
it returns, as plain data: numbers, texts, the families and numbers of distributions, the shape of an
example. Functions, and what else no file can hold, are noted as such and refused when the call is repeated.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

import pyro.distributions
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from probdefense.core import families
from probdefense.core.families import numbers_of
from probdefense.core.networks import record
from probdefense.validation import bound, plain

P = ParamSpec("P")
D = TypeVar("D", bound=nn.Module)
K = TypeVar("K", bound=type)

BUILDERS: dict[str, Callable[..., Any]] = {}
"""Every function that was decorated, by name."""

HOMES = {"pyro": pyro.distributions, "torch": torch.distributions, "probdefense": families}
"""Where the distributions are defined that a file may name."""

RECORDED: dict[str, Any] = {}
"""Classes of arguments that a file may hold by what they were made with, by name."""


def recordable(kind: K) -> K:
    """Registers a class whose ``record()``, or its fields, is what a file needs to make one like it."""
    RECORDED[kind.__name__] = kind
    return kind


class Call(NamedTuple):
    """A call of a builder as plain data; `members` counts the networks where it took several."""

    builder: str
    arguments: dict[str, Any]
    members: int | None = None


class Unrecordable(ValueError):
    """A call cannot be repeated from its record."""


def builder(function: Callable[P, D]) -> Callable[P, D]:
    """Registers a builder by its name; what it returns has the calls that made it as ``calls``.

    Args:
        function: Takes the network (or networks) first.

    Returns:
        The same function, recording.

    Raises:
        ValueError: the name is taken.
    """
    name, signature = function.__name__, inspect.signature(function)
    known = BUILDERS.get(name, function)  # a cell of a notebook may be run again
    if (known.__module__, known.__qualname__) != (function.__module__, function.__qualname__):
        raise ValueError(
            f"expected a new name for a builder, got {name!r} of {known.__module__}; choose another"
        )

    @functools.wraps(function)
    def recorded(*args: P.args, **kwargs: P.kwargs) -> D:
        given = bound(name, signature, args, kwargs)
        given.apply_defaults()
        first, *others = given.arguments
        given.arguments[first] = net = _several(given.arguments[first])
        defense: Any = function(*given.args, **given.kwargs)
        before = getattr(net, "calls", ())
        arguments = {key: described(given.arguments[key], key) for key in others}
        call = Call(name, arguments, len(net) if isinstance(net, list) else None)
        defense.calls = None if before is None else (*before, call)
        defense.origin = net.origin if before else _common(net)
        return defense

    BUILDERS[name] = recorded
    return recorded


def _common(net: Any) -> dict[str, Any] | None:
    """The record of a network, or of networks that are all alike."""
    found = [record(each) for each in (net if isinstance(net, list) else [net])]
    return found[0] if all(each == found[0] for each in found) else None


def repeated(calls: Iterable[Call], net: Any) -> Any:
    """The defense that these calls make of a network.

    Args:
        calls: As noted on a defense.
        net: The network; of an ensemble one like all members, or all of them.

    Raises:
        Unrecordable: an argument that no file holds, an unknown builder, or another number of members.
    """
    made = _several(net)
    for call in calls:
        if call.builder not in BUILDERS:
            raise Unrecordable(
                f"no builder is named {call.builder!r} here; import the module that defines it"
            )
        if call.members is not None and isinstance(made, nn.Module):
            made = [made] * call.members
        if call.members is not None and len(made) != call.members:
            raise Unrecordable(f"expected net as one network or {call.members}, got {len(made)}")
        arguments = {key: restored(value, f"{call.builder}({key}=)") for key, value in call.arguments.items()}
        made = BUILDERS[call.builder](made, **arguments)
    return made


def described(value: Any, name: str) -> Any:
    """An argument as JSON can hold it; what it cannot hold by a few words under ``"own"``."""
    value = plain(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [described(part, name) for part in value]
    if isinstance(value, Mapping):
        return {"mapping": {str(key): described(part, name) for key, part in value.items()}}
    if isinstance(value, Tensor) and name == "example":  # only its shape matters to a builder
        return {"example": list(value.shape[1:]), "dtype": _dtype(value)}
    if RECORDED.get(type(value).__name__) is type(value):
        parts = value.record() if hasattr(value, "record") else vars(value)
        held = {key: described(part, key) for key, part in parts.items()}
        return {"made": type(value).__name__, "of": held}
    kind = _named(value if isinstance(value, type) else type(value))
    if kind is not None and isinstance(value, type):
        return {"family": kind}
    if kind is not None and (numbers := numbers_of(value)):
        parts = {key: [number.tolist(), _dtype(number)] for key, number in numbers.items()}
        return {"distribution": kind, "numbers": parts}
    word = "class" if isinstance(value, type) else type(value).__name__
    return {"own": f"{word} {getattr(value, '__qualname__', '')}".strip()}


def restored(value: Any, where: str) -> Any:
    """The argument that was `described`.

    Raises:
        Unrecordable: no file can hold it, or it is no description.
    """
    if isinstance(value, list):
        return [restored(part, where) for part in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"mapping": dict(parts)}:
            return {key: restored(part, where) for key, part in parts.items()}
        case {"example": list(shape), "dtype": str(dtype)}:
            return torch.zeros((1, *shape), dtype=_torch_dtype(dtype))
        case {"made": str(kind), "of": dict(parts)} if kind in RECORDED:
            return RECORDED[kind](**{key: restored(part, where) for key, part in parts.items()})
        case {"family": str(kind)}:
            return _found(kind)
        case {"distribution": str(kind), "numbers": dict(numbers)}:
            tensors = {k: torch.tensor(v, dtype=_torch_dtype(dtype)) for k, (v, dtype) in numbers.items()}
            return _found(kind)(**tensors)
        case {"own": str(what)}:
            raise Unrecordable(f"{where} was a {what}, which no file can hold")
    raise Unrecordable(f"the record of {where} says nothing that is known here")


def _several(net: Any) -> Any:
    """The networks of an ensemble as a list; anything else as it is."""
    single = isinstance(net, nn.Module | str) or hasattr(net, "__array__")
    single = single and not isinstance(net, nn.ModuleList)
    return list(net) if isinstance(net, Iterable) and not single else net


def _named(kind: type) -> str | None:
    """``"pyro.Normal"`` and the like, of a class that a file may name."""
    for home, module in HOMES.items():
        if issubclass(kind, Distribution) and getattr(module, kind.__name__, None) is kind:
            return f"{home}.{kind.__name__}"
    return None


def _found(name: str) -> Any:
    home, _, attribute = name.partition(".")
    kind = getattr(HOMES.get(home), attribute, None)
    if not isinstance(kind, type) or _named(kind) != name:
        raise Unrecordable(f"no distribution is named {name!r} here")
    return kind


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise Unrecordable(f"no type of numbers is named {name!r} here")
    return dtype
