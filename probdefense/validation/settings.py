"""Settings: numbers, seeds, radii, functions and names, in the form that the library works with."""

import difflib
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 2**63
"""No setting is as large: torch would not take it."""

WIDEST = 3e38
"""What single precision holds."""


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Refuses anything but an integer of at least `least`; returns it.

    Raises:
        TypeError: not an integer.
        ValueError: too small.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(
            f"expected {name} as an integer, got {kind_of(value)}; give a whole number of at least {least}"
        )
    if number >= LARGEST:
        raise ValueError(f"expected {name} below 2**63, got {number}; give a smaller number")
    if number < least:
        raise ValueError(f"expected {name} >= {least}, got {number}; give a whole number of at least {least}")
    return number


def check_seed(seed: Any, name: str = "seed") -> int:
    """Refuses anything but a non-negative integer of 63 bits; returns it.

    Raises:
        TypeError: not an integer.
        ValueError: negative or too large.
    """
    return check_count(name, seed, least=0)


def check_seeds(seeds: Any, batch: int) -> Tensor:
    """Refuses anything but integers, one per example; returns them, int64 ``(batch,)``.

    Raises:
        TypeError: not integers.
        ValueError: another number of them.
    """
    given = torch.as_tensor(seeds)
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise TypeError(
            f"expected seed as an integer, or one per example, got {given.dtype}; convert with .long()"
        )
    if given.shape != (batch,):
        raise ValueError(
            f"expected seed as one number, or one seed per example ({batch},), got shape "
            f"{tuple(given.shape)}; torch.arange(len(x)) is one choice"
        )
    return given.long()


def plain(value: Any) -> Any:
    """A number of NumPy or a tensor of one number as Python's number; anything else as it is."""
    stored = getattr(getattr(value, "device", None), "type", "cpu") != "meta"
    single = stored and hasattr(value, "item") and getattr(value, "shape", None) == ()
    return value.item() if single else value


def check_number(name: str, value: Any, *, nan: bool = False) -> float:
    """Refuses anything but a number, infinity included and NaN if asked; returns it.

    Raises:
        TypeError: not a number.
        ValueError: NaN, or an integer beyond 64 bits.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"expected {name} as a number, got {kind_of(value)}; give one number")
    if isinstance(number, int) and abs(number) >= LARGEST:
        raise ValueError(f"expected {name} below 2**63, got {number}; give a smaller number")
    if math.isnan(number) and not nan:
        raise ValueError(f"expected {name} as a number, got NaN; look for where it comes from")
    return number


def check_positive(name: str, value: Any, *, zero: bool = False) -> float:
    """Refuses anything but a finite positive number (or, with `zero`, a non-negative one); returns it.

    Raises:
        TypeError: not a number.
        ValueError: not finite or too small.
    """
    number = check_number(name, value, nan=True)
    if not abs(number) <= WIDEST or number < 0 or (number == 0 and not zero):
        least = "of at least 0" if zero else "above 0"
        raise ValueError(
            f"expected {name} {'>=' if zero else '>'} 0 and finite, got {number}; give one number {least}"
        )
    return number


def check_share(name: str, value: Any, *, ends: str = "()") -> float:
    """Refuses anything but a number between 0 and 1; returns it.

    Args:
        name: For the message.
        value: What came.
        ends: ``"()"`` without the ends, ``"[]"`` with both, ``"[)"`` or ``"(]"``.

    Raises:
        TypeError: not a number.
        ValueError: outside.
    """
    number = check_number(name, value, nan=True)
    if ends == "()" and number <= 0:
        check_positive(name, value)
    inside = 0 < number < 1 or (number == 0 and ends[0] == "[") or (number == 1 and ends[1] == "]")
    if not inside:
        wanted = f"0 < {name} < 1" if ends == "()" else f"{name} in {ends[0]}0, 1{ends[1]}"
        raise ValueError(f"expected {wanted}, got {number}; give a share between 0 and 1")
    return number


def check_eps(eps: Any, batch: int | None = None, norm: float | None = None) -> Any:
    """Refuses a radius that is negative, not finite, or not one number or one per example; returns it.

    Args:
        eps: The radius, or one per example.
        batch: Examples, where there may be one each.
        norm: Of the ball, where it is known: in l-inf a radius above 1 is one of gray levels.

    Raises:
        TypeError: not a number, tensor or array.
        ValueError: negative, not finite, too large, or the wrong shape.
    """
    radii = _radii(eps, batch)
    if norm == math.inf and (torch.as_tensor(radii) > 1).any():
        largest = f"{float(torch.as_tensor(radii).max()):g}"
        raise ValueError(
            f"expected eps <= 1 in l-inf, because pixels are in [0, 1], got {largest}; {largest} of 255 gray "
            f"levels are {largest} / 255"
        )
    return radii


def _radii(eps: Any, batch: int | None) -> Any:
    if not isinstance(getattr(eps, "shape", ()), tuple) or getattr(eps, "shape", ()) == ():
        return check_positive("eps", eps, zero=True)
    radii = torch.as_tensor(eps)
    if radii.dtype == torch.bool or radii.is_complex():
        raise TypeError(f"expected eps as numbers, got {radii.dtype}; give radii in pixels")
    if batch is None or radii.shape != (batch,):
        wanted = "one number" if batch is None else f"one number or one per example ({batch},)"
        raise ValueError(
            f"expected eps as {wanted}, got shape {tuple(radii.shape)}; give one radius, or a flat tensor of "
            "as many as there are examples"
        )
    if not bool(torch.isfinite(radii).all()) or bool((radii < 0).any()):
        raise ValueError(
            "expected eps >= 0 and finite, in pixels, got a negative or non-finite value; look at eps.min() "
            "and eps.max()"
        )
    return radii if radii.is_floating_point() else radii.float()


def nearest(word: str, known: Iterable[str]) -> str:
    """The question whether the nearest known word was meant, or nothing; one that contains it is nearest."""
    known = list(known)
    near = difflib.get_close_matches(word, [each for each in known if word in each] or known, 1, 0.0)
    return f"did you mean {near[0]!r}?" if near else ""


def bound(
    name: str, signature: inspect.Signature, given: Sequence[Any], named: Mapping[str, Any]
) -> inspect.BoundArguments:
    """The arguments of a call of the function of that name.

    Raises:
        TypeError: some are missing, too many or unknown; names the nearest known keyword.
    """
    parameters = signature.parameters.values()
    open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters)
    known = [each.name for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)]
    for unknown in [] if open_ended else [key for key in named if key not in known]:
        raise TypeError(
            f"expected keywords that {name} knows, got an unexpected keyword argument {unknown!r}; "
            f"{nearest(unknown, known)} It takes {', '.join(known)}"
        )
    return signature.bind(*given, **named)


def check_norm(norm: Any) -> float:
    """Refuses a norm other than 1, 2 and infinity; returns it.

    Raises:
        ValueError: another norm.
    """
    number = plain(norm)
    if isinstance(number, bool) or not isinstance(number, int | float) or number not in (1, 2, math.inf):
        raise ValueError(
            f"expected norm 1, 2 or math.inf, got {kind_of(norm)}; name one of the three as a number"
        )
    return number


def check_function(name: str, value: Any, *arguments: str, **options: Any) -> None:
    """Refuses what cannot be called with these arguments and options.

    Raises:
        TypeError: not a function, or one of other arguments.
    """
    wanted = f"expected {name} as a function of ({', '.join((*arguments, *options))})"
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{wanted}, got {kind_of(value)}; pass the function itself, or a lambda")
    with suppress(ValueError):  # of some builtin functions nobody knows the arguments
        signature = inspect.signature(value.forward if isinstance(value, nn.Module) else value)
        try:
            signature.bind(*arguments, **options)
        except TypeError as error:
            raise TypeError(f"{wanted}, got one of {signature}: {error}; wrap it in a lambda") from error


def check_attack(value: Any, name: str = "attack") -> None:
    """Refuses what cannot be called with a function, inputs and labels; options may come later.

    Raises:
        TypeError: not a function, or one of other arguments.
    """
    _check_open(name, value, ("logits_fn", "x", "y"), "probdefense.attacks.pgd")


def check_objective(value: Any, name: str = "objective") -> None:
    """Refuses what cannot be called with a defense, inputs and labels; options may come later.

    Raises:
        TypeError: not a function, or one of other arguments.
    """
    _check_open(name, value, ("defense", "x", "y"), "probdefense.objectives.elbo")


def check_bare(value: Any) -> None:
    """Refuses what cannot be called with inputs and taken for a function with logits.

    Raises:
        TypeError: not a function, or one of other arguments.
    """
    _check_open("a LogitsFn", value, ("x",), "x -> (samples, batch, classes), or give a Defense")


def _check_open(name: str, value: Any, arguments: tuple[str, ...], such: str) -> None:
    wanted = f"expected {name} as a function of ({', '.join(arguments)}, ...)"
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{wanted}, got {kind_of(value)}; pass the function itself, such as {such}")
    with suppress(ValueError):  # of some builtin functions nobody knows the arguments
        signature = inspect.signature(value)
        try:
            signature.bind_partial(*arguments)
        except TypeError as error:
            raise TypeError(f"{wanted}, got one of {signature}: {error}; wrap it in a lambda") from error


def check_member(name: str, value: Any, known: Any) -> None:
    """Refuses a name that is not among the known ones, and lists them.

    Raises:
        TypeError: not a text.
        ValueError: unknown name.
    """
    if not isinstance(value, str):
        raise TypeError(f"expected {name} as a text, got {kind_of(value)}; known: {', '.join(sorted(known))}")
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(sorted(known))}")


def check_kind(name: str, value: Any, kind: type | tuple[type, ...], way: str) -> None:
    """Refuses what is not of a class; `way` says how to get one.

    Raises:
        TypeError: another class.
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise TypeError(
            f"expected {name} as {' or '.join(k.__name__ for k in kinds)}, got {kind_of(value)}; {way}"
        )


def kind_of(value: Any) -> str:
    """What came, in a few words."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        return f"{type(value).__name__} of shape {tuple(shape)} and {getattr(value, 'dtype', 'no dtype')}"
    return f"{type(value).__name__} {value!r:.60}"
