"""The examples of an evaluation, in the order given, as chunks of one size: the unit of everything after."""

from collections.abc import Iterable, Iterator, Sized
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from probdefense.prediction.reading import batches
from probdefense.types import Data, Inputs, Labels
from probdefense.validation import check_count


class Chunk(NamedTuple):
    """Some examples ``(batch, *event)`` with their labels ``(batch,)``, and the number of the first one.

    Of a part of a chunk `rows` says which of its examples are left.
    """

    number: int
    first: int
    x: Inputs
    y: Labels
    rows: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        """The numbers of the examples in the whole set, ``(batch,)``."""
        rows = torch.arange(len(self.x), device=self.x.device) if self.rows is None else self.rows
        return self.first + rows

    def take(self, rows: Tensor) -> "Chunk":
        """A part of the chunk."""
        return self._replace(x=self.x[rows], y=self.y[rows], rows=rows)

    def on(self, device: torch.device | None) -> "Chunk":
        """The chunk on a device; where it is without one."""
        return self if device is None else self._replace(x=self.x.to(device), y=self.y.to(device))


def chunks(data: Data, size: int, first: int = 0) -> Iterator[Chunk]:
    """The examples in chunks of `size`, whatever the batches that they come in; one chunk is held at a time.

    Args:
        data: ``(x, y)``, a map-style data set, or a loader of such batches that keeps their order.
        size: Examples per chunk; the last one may have fewer.
        first: The number of the first example, a multiple of `size`.

    Raises:
        TypeError: none of these, or bad inputs or labels.
        ValueError: no examples, a loader that shuffles, or bad inputs or labels.
    """
    check_count("chunk_size", size)
    number = first // size
    for x, y in _regrouped(batches(data, ordered=True), size):
        yield Chunk(number, number * size, x, y)
        number += 1
    if number == first // size:
        raise ValueError("expected at least one batch (x, y), got an empty loader; look at its data")


def num_chunks(data: Data, size: int) -> int | None:
    """How many chunks there will be; None where nobody knows."""
    examples: object = data
    if isinstance(data, tuple) and data:
        examples = data[0]
    elif isinstance(data, DataLoader):
        examples = data.dataset
    return -(-len(examples) // size) if isinstance(examples, Sized) else None


def gather(data: Data) -> tuple[Inputs, Labels]:
    """All examples of ``(x, y)``, a data set or a loader, as two tensors.

    Raises:
        TypeError: none of these.
        ValueError: no examples.
    """
    found = list(batches(data))
    if not found:
        raise ValueError("expected at least one batch (x, y), got an empty loader; look at its data")
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])


def _regrouped(pairs: Iterable[tuple[Inputs, Labels]], size: int) -> Iterator[tuple[Inputs, Labels]]:
    """The same examples in batches of one size."""
    held: list[tuple[Inputs, Labels]] = []
    count = 0
    for x, y in pairs:
        held.append((x, y))
        count += len(x)
        while count >= size:
            xs, ys = torch.cat([x for x, _ in held]), torch.cat([y for _, y in held])
            yield xs[:size], ys[:size]
            held, count = ([(xs[size:], ys[size:])] if count > size else []), count - size
    if count:
        yield torch.cat([x for x, _ in held]), torch.cat([y for _, y in held])
