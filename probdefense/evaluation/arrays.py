"""What is known of every example, by key: the one place that knows how the arrays of a report are named."""

from collections.abc import Iterable

import numpy as np

AXES = {"correct": ("verdict", "example"), "log_probs": ("example", "class")}
"""Names of the axes of an array by its kind; of every other kind there is one number per example."""


class Arrays(dict[str, np.ndarray]):
    """Arrays by key ``kind/defense[/attack[/eps[/rule]]]``; a radius is written with all its digits.

    Kinds: ``labels``, ``ids`` (the numbers of the examples in the whole set), ``distance`` and
    ``fingerprint`` (a number that tells the defense from others), ``(batch,)``;
    ``correct`` ``(verdicts, batch)`` by rule;
    ``log_probs`` ``(batch, classes)`` of the mean probability; ``expected_entropy`` ``(batch,)`` in nats.

    Examples:
        >>> arrays = Arrays()
        >>> arrays.put(np.array([True]), "correct", "plain", "pgd", 0.2, "vote")
        >>> list(arrays)
        ['correct/plain/pgd/0.2/vote']
    """

    @staticmethod
    def key(kind: str, *path: str | float) -> str:
        """The key of an array: its kind, then defense, attack, radius and rule as far as they matter."""
        return "/".join([kind, *(part if isinstance(part, str) else exact(part) for part in path)])

    def put(self, array: np.ndarray, kind: str, *path: str | float) -> None:
        """Files an array."""
        self[self.key(kind, *path)] = array

    def at(self, kind: str, *path: str | float) -> np.ndarray:
        """The array under a key.

        Raises:
            KeyError: there is none.
        """
        return self[self.key(kind, *path)]

    def examples(self, defense: str) -> np.ndarray:
        """Labels and numbers of the examples that a defense saw, ``(2, batch)``, or those that are kept."""
        kept = [self.get(self.key(kind, defense)) for kind in ("labels", "ids")]
        return np.array([each for each in kept if each is not None])

    def dims(self) -> dict[str, list[str]]:
        """The names of the axes of every array, by key."""
        return {key: [*AXES.get(key.partition("/")[0], ("example",))] for key in self}

    def only(self, defense: str) -> "Arrays":
        """The arrays of one defense."""
        return Arrays({key: array for key, array in self.items() if key.split("/")[1] == defense})


def exact(radius: float) -> str:
    """The shortest text that stands for this radius and no other.

    Examples:
        >>> exact(0.0), exact(0.1), exact(0.10000004), exact(float("inf"))
        ('0', '0.1', '0.10000004', 'inf')
    """
    return repr(float(radius)).removesuffix(".0")


def radii_of(eps: object) -> list[float]:
    """The radii of an ``eps=`` argument: a number, several, or a tensor or array of them; each once.

    Raises:
        TypeError: neither a number nor several.

    Examples:
        >>> radii_of(0.1), radii_of(np.array([0.1, 0.2, 0.1]))
        ([0.1], [0.1, 0.2])
    """
    values = eps.tolist() if hasattr(eps, "tolist") else eps
    several = [values] if isinstance(values, int | float) and not isinstance(values, bool) else values
    if isinstance(several, str) or not isinstance(several, Iterable):
        raise TypeError(
            f"expected eps as one radius in pixels or several, got {type(eps).__name__} {eps!r}; give numbers"
        )
    found = [value.item() if hasattr(value, "item") else value for value in several]
    wrong = [value for value in found if isinstance(value, bool) or not isinstance(value, int | float)]
    if wrong:
        raise TypeError(
            f"expected every eps as a number, got {type(wrong[0]).__name__} {wrong[0]!r}; give pixels"
        )
    return list(dict.fromkeys(float(value) for value in found))
