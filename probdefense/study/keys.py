"""Keys and values of study files: what is unknown is refused with the nearest known key."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from probdefense.validation import kind_of, nearest


def check_keys(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuses keys that are not among the known ones.

    Raises:
        ValueError: an unknown key; names the nearest known one.

    Examples:
        >>> check_keys("[training]", ["epoch"], ["epochs", "workers"])
        Traceback (most recent call last):
        ...
        ValueError: unknown key 'epoch' in [training]; did you mean 'epochs'? known: epochs, workers
    """
    known = list(known)
    for key in given:
        if key not in known:
            hint = f"{nearest(key, known)} known: {', '.join(known) or 'none at all'}"
            raise ValueError(f"unknown key {key!r} in {where}; {hint.strip()}")


def check_values(where: str, given: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """Refuses values of another kind than those by default, where these say one.

    Raises:
        ValueError: a text for a number, a fraction for a count, and so on.

    Examples:
        >>> check_values("[training]", {"epochs": "ten"}, {"epochs": 46})
        Traceback (most recent call last):
        ...
        ValueError: expected epochs in [training] as a whole number, such as 46, got str 'ten'
    """
    for key, value in given.items():
        default = like.get(key)
        words = next((told for kind, told in KINDS.items() if type(default) is kind), None)
        fits = type(value) is type(default) or (type(default) is float and type(value) is int)
        if words is not None and not fits:
            raise ValueError(
                f"expected {key} in {where} as {words}, such as {default!r}, got {kind_of(value)}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"expected {key} in {where} as a finite number, got {value}")


KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
