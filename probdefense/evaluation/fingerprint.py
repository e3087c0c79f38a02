"""A hash of what an evaluation is made of: defenses by their state, attacks by their code and settings.

Text that ``repr`` makes may hold addresses, so it is never used: what is not understood is refused.
"""

import dataclasses
import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Words = Callable[[str], None]


def fingerprint(thing: Any, name: str) -> str:
    """A hash of a defense, an attack, data or settings.

    Args:
        thing: What is hashed; an attribute ``fingerprint`` speaks for itself.
        name: For the message: what it is.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: it holds something that cannot be hashed.

    Examples:
        >>> import probdefense as pd
        >>> one, other = (partial(pd.attacks.pgd, eps=eps) for eps in (0.1, 0.2))
        >>> fingerprint(one, "pgd") == fingerprint(other, "pgd")
        False
    """
    total = hashlib.sha256()
    try:
        _write(thing, lambda word: total.update(word.encode() + b"\0"), [])
    except TypeError as error:
        raise ValueError(
            f"{name!r} cannot be told from others: {error}; set its attribute fingerprint to a text that "
            "changes whenever it does"
        ) from error
    return total.hexdigest()


def mark(thing: Any) -> int:
    """The fingerprint of a thing as a number of 60 bits; 0 where it has none."""
    try:
        return int(fingerprint(thing, "defense")[:15], 16)
    except ValueError:
        return 0


def _write(thing: Any, say: Words, seen: list[int]) -> None:
    """Says the words that tell a thing from others; `seen` are the things that hold it."""
    if id(thing) in seen:
        say("again")
        return
    seen = [*seen, id(thing)]
    own = getattr(thing, "fingerprint", None)
    if isinstance(own, str):
        say(own)
    elif thing is None or thing is ... or isinstance(thing, bool | int | float | str | bytes | complex):
        say(f"{type(thing).__name__} {thing!r}")
    elif isinstance(thing, Tensor | np.ndarray):
        _write_array(thing, say)
    elif isinstance(thing, torch.dtype | torch.device | torch.Size):
        say(str(thing))
    elif isinstance(thing, type):
        say(f"{thing.__module__}.{thing.__qualname__}")
    elif isinstance(thing, nn.Module):
        _write_module(thing, say, seen)
    else:
        _write_object(thing, say, seen)


def _write_object(thing: Any, say: Words, seen: list[int]) -> None:
    if isinstance(thing, Mapping):
        parts = [part for item in thing.items() for part in item]
    elif isinstance(thing, list | tuple):
        parts = list(thing)
    elif isinstance(thing, set | frozenset):
        parts = sorted(thing, key=str)
    elif isinstance(thing, functools.partial):
        parts = [thing.func, *thing.args, dict(sorted(thing.keywords.items()))]
    elif isinstance(thing, types.MethodType):
        parts = [thing.__self__, thing.__func__]
    elif isinstance(thing, types.BuiltinFunctionType):
        parts = [thing.__module__, thing.__qualname__]
    elif isinstance(thing, types.CodeType):
        parts = [thing.co_code, list(thing.co_consts), list(thing.co_names), list(thing.co_varnames)]
    elif isinstance(thing, types.FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or ()]
        parts = [
            thing.__module__,
            thing.__qualname__,
            thing.__code__,
            thing.__defaults__,
            thing.__kwdefaults__,
        ]
        parts += [*cells, {k: v for k, v in vars(thing).items() if k not in ("__wrapped__", "__signature__")}]
    elif _speaks_by_attributes(thing):
        passing = {"_validate_args", "stacklevel", *getattr(type(thing), "runtime_attributes", ())}
        parts = [type(thing), {k: v for k, v in vars(thing).items() if k not in passing}]
    else:
        raise TypeError(f"it holds {type(thing).__name__}, which has no fingerprint")
    say(f"{type(thing).__name__} of {len(parts)}")
    for part in parts:
        _write(part, say, seen)


def _write_array(array: Tensor | np.ndarray, say: Words) -> None:
    values = array.detach().cpu().contiguous() if isinstance(array, Tensor) else torch.as_tensor(array.copy())
    data = hashlib.sha256(values.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    say(f"{values.dtype} {tuple(values.shape)} {data}")


def _write_module(module: nn.Module, say: Words, seen: list[int]) -> None:
    """The layers, their plain settings and code, and the state."""
    for path, layer in module.named_modules():
        kind = type(layer)
        say(f"{path} {kind.__module__}.{kind.__qualname__}")
        passing = {"training", *getattr(layer, "runtime_attributes", ())}
        for name, value in sorted(vars(layer).items()):
            if name[0] != "_" and name not in passing and isinstance(value, bool | int | float | str | tuple):
                _write([name, value], say, seen)
        if not kind.__module__.startswith(("torch.", "pyro.", "probdefense.")):
            _write(inspect.unwrap(kind.forward).__code__, say, seen)
    for name, value in module.state_dict().items():
        _write([name, value], say, seen)


def _speaks_by_attributes(thing: Any) -> bool:
    """Whether the attributes of an object are all that it is."""
    if dataclasses.is_dataclass(thing) or isinstance(thing, torch.distributions.Distribution):
        return True
    return type(thing).__module__.startswith("probdefense.") and hasattr(thing, "__dict__")
