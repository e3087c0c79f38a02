"""Records of networks, as plain data: what a file needs to make a network again without its code.

A layer of ``torch.nn`` or of ours is recorded by the arguments that it was made with, a stack of layers by
its layers, and what a function made by its name and arguments, as long as nobody has changed it since.
"""

import functools
import inspect
import json
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

import probdefense.nn
from probdefense.validation import plain

P = ParamSpec("P")
Net = TypeVar("Net", bound=nn.Module)

NETWORKS: dict[str, Callable[..., nn.Module]] = {}
"""Every function that was decorated, by name."""

HOMES = {"torch": torch.nn, "probdefense": probdefense.nn}
"""Where the layers are defined that a file may name."""


class Origin(NamedTuple):
    """The call that made a network, and what it looked like then."""

    network: str
    settings: dict[str, Any]
    layers: list[Any]


def network(function: Callable[P, Net]) -> Callable[P, Net]:
    """Registers a function that makes a network; what it returns can be recorded by its name.

    Args:
        function: Takes numbers and texts.

    Returns:
        The same function, recording.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def recorded(*args: P.args, **kwargs: P.kwargs) -> Net:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        made: Any = function(*args, **kwargs)
        settings = {name: plain(value) for name, value in bound.arguments.items()}
        made._origin = Origin(function.__name__, settings, _seen(made))
        return made

    NETWORKS[function.__name__] = recorded
    return recorded


def record(net: Any) -> dict[str, Any] | None:
    """How to make a network like this one, as JSON can hold it; None where only its own code can.

    Examples:
        >>> record(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))["layers"][1][1]["settings"]
        {'in_features': 4, 'out_features': 2, 'bias': True}
        >>> record(nn.Module()) is None
        True
    """
    try:
        found = _record(net)
    except LookupError:
        return None
    for walk in (net.named_modules, net.named_parameters):
        if len(list(walk(remove_duplicate=False))) > len(list(walk())):
            return None  # what is shared would not be shared again
    dtypes = {p.dtype for p in net.parameters() if p.is_floating_point()}
    if len(dtypes) > 1:
        return None
    dtype = dtypes.pop() if dtypes else torch.get_default_dtype()
    return json.loads(json.dumps({**found, "dtype": str(dtype).removeprefix("torch.")}))  # lists for tuples


def remade(found: Any) -> nn.Module:
    """A network like the one that was recorded, untrained.

    Raises:
        ValueError: the record says nothing that is known here.
    """
    try:
        return _remade(found).to(getattr(torch, found["dtype"]))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the record of the network says nothing that is known here: {error}") from error


def _record(net: Any) -> dict[str, Any]:
    """The record of a network or layer.

    Raises:
        LookupError: there is none.
    """
    if not isinstance(net, nn.Module) or _is_changed(net):
        raise LookupError(type(net).__name__)
    origin = getattr(net, "_origin", None)
    if isinstance(origin, Origin):
        if origin.layers != _seen(net) or not all(map(_is_plain, origin.settings.values())):
            raise LookupError("a network that was changed, or made of more than numbers and texts")
        return {"network": origin.network, "settings": origin.settings}
    if type(net) is nn.Sequential:
        return {"layers": [[name, _record(layer)] for name, layer in net.named_children()]}
    home = next((home for home, place in HOMES.items() if _holds(place, type(net))), None)
    if home is None or list(net.children()) or type(net).forward is nn.Module.forward:
        raise LookupError(type(net).__name__)
    return {"layer": f"{home}.{type(net).__name__}", "settings": _settings(net)}


def _remade(found: Any) -> nn.Module:
    if "layers" in found:
        made = nn.Sequential()
        for name, layer in found["layers"]:
            made.add_module(name, _remade(layer))
        return made
    if "network" in found:
        return NETWORKS[found["network"]](**_tupled(found["settings"]))
    home, _, name = found["layer"].partition(".")
    kind = getattr(HOMES[home], name)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module) and _holds(HOMES[home], kind)):
        raise LookupError(f"no layer is named {found['layer']!r}")
    return kind(**_tupled(found["settings"]))


def _tupled(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _settings(layer: nn.Module) -> dict[str, Any]:
    """The arguments of a layer, which it keeps under their names.

    Raises:
        LookupError: it keeps them otherwise.
    """
    found = {}
    for name, parameter in inspect.signature(type(layer)).parameters.items():
        if name in ("device", "dtype") or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = getattr(layer, name, LookupError)
        if isinstance(value, nn.Parameter) or (name == "bias" and value is None):
            value = value is not None
        elif isinstance(value, Tensor):
            value = value.tolist()
        if not _is_plain(value):
            raise LookupError(f"{type(layer).__name__}({name}=)")
        found[name] = plain(value)
    return found


def _seen(net: nn.Module) -> list[Any]:
    """The layers of a network with their plain settings, by which a later change is noticed."""
    return [
        (path, type(layer), [(n, v) for n, v in sorted(vars(layer).items()) if _is_setting(n, v)])
        for path, layer in net.named_modules()
    ] + [(name, tuple(value.shape)) for name, value in net.state_dict().items()]


def _is_setting(name: str, value: Any) -> bool:
    return name[0] != "_" and name != "training" and isinstance(value, bool | int | float | str | tuple)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | tuple | list)


def _is_changed(net: nn.Module) -> bool:
    """Whether something of its own acts on the answers of a network: a forward, or hooks."""
    return any(
        "forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks or hasattr(m, "parametrizations")
        for m in net.modules()
    )


def _holds(place: Any, kind: type) -> bool:
    return getattr(place, kind.__name__, None) is kind
