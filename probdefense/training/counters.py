"""What an objective counts: the parts of it that move from call to call, such as `warm_up`."""

from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn


def counters(function: Any) -> list[Any]:
    """The parts of a function that have a ``state_dict`` and a ``load_state_dict``, in a fixed order.

    Looked for in what a function is made of: arguments of `partial`, closures, defaults and attributes of
    callable objects. Modules are left out: they are networks.
    """
    found: list[Any] = []
    seen: set[int] = set()

    def visit(part: Any) -> None:
        if id(part) in seen or isinstance(part, nn.Module | type):
            return
        seen.add(id(part))
        if hasattr(part, "state_dict") and hasattr(part, "load_state_dict"):
            found.append(part)
            return
        for inner in _parts(part):
            visit(inner)

    visit(function)
    return found


def _parts(part: Any) -> list[Any]:
    if isinstance(part, partial):
        return [part.func, *part.args, *part.keywords.values()]
    if isinstance(part, FunctionType):
        return [*_closed(part), *(part.__defaults__ or ()), *(part.__kwdefaults__ or {}).values()]
    if isinstance(part, MethodType):
        return [part.__self__, part.__func__]
    if isinstance(part, list | tuple):
        return list(part)
    if isinstance(part, dict):
        return list(part.values())
    return list(vars(part).values()) if callable(part) and hasattr(part, "__dict__") else []


def _closed(function: FunctionType) -> list[Any]:
    """What a function holds on to; cells may be empty yet."""
    found = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            found.append(cell.cell_contents)
    return found
