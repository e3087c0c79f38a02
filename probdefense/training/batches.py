"""What a loader must be: something that gives batches ``(x, y)`` of tensors, anew in every epoch."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from probdefense.types import Inputs, Labels
from probdefense.validation import check_examples

Batches = Iterable[tuple[Inputs, Labels]]


def check_loader(loader: Any, epochs: int = 1) -> None:
    """Refuses what gives no batches, before any work; lists are looked through.

    Raises:
        TypeError: data instead of batches, or nothing to iterate over.
        ValueError: no batches, bad data, or a generator that would have to start again.
    """
    if isinstance(loader, Generator) and epochs > 1:
        raise ValueError(
            f"expected a loader that starts anew in each of {epochs} epochs, got a generator, which ends "
            "with the first; pass a list of the batches or a DataLoader"
        )
    arrays = isinstance(loader, Tensor) or hasattr(loader, "__array__")
    if arrays or not isinstance(loader, Iterable) or isinstance(loader, Mapping | str | bytes):
        raise TypeError(_unfit("a loader of batches (x, y)", loader))
    if 0 in (num_examples(loader), length(loader)):
        raise ValueError(
            "the loader has no examples; expected batches (x, y), and without drop_last=True for a data set "
            "below one batch"
        )


def num_examples(loader: Batches) -> int | None:
    """The size of a loader's data set, or of a list of batches; None where nobody knows."""
    if isinstance(loader, Sequence):
        return sum(len(checked(batch)[1]) for batch in loader)
    return length(getattr(loader, "dataset", None))


def length(of: Any) -> int | None:
    """``len(of)``, or None where there is none: a loader over an `IterableDataset` has the method only."""
    try:
        return len(of)
    except (TypeError, NotImplementedError):
        return None


def batches(loader: Batches, device: torch.device) -> Iterator[tuple[Inputs, Labels]]:
    """The checked batches of one epoch on a device.

    Raises:
        TypeError: batches that are not pairs of tensors.
        ValueError: bad data, or no batch at all.
    """
    empty = True
    for batch in loader:
        x, y = checked(batch)
        empty = False
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)
    if empty:
        raise ValueError(
            "the loader gave no batch; expected batches (x, y) in every epoch: an iterator that was used up "
            "does not start again"
        )


def checked(batch: Any) -> tuple[Inputs, Labels]:
    """A batch as a pair of inputs and labels.

    Raises:
        TypeError: it is not a pair of tensors.
        ValueError: bad data.
    """
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise TypeError(_unfit("batches (x, y)", batch))
    return check_examples(batch)


def _unfit(expected: str, got: Any) -> str:
    """What to say of data in another form."""
    kind = type(got).__name__
    if isinstance(got, Mapping):
        came, way = (
            f"a {kind} of {', '.join(map(str, got)) or 'nothing'}",
            "give pairs: collate_fn= of DataLoader",
        )
    elif isinstance(got, list | tuple):
        came, way = f"a {kind} of {len(got)}", "give pairs: collate_fn= of DataLoader drops the rest"
    elif isinstance(got, Tensor) or hasattr(got, "__array__"):
        came, way = f"a {kind}", "DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True) makes them"
    else:
        came, way = f"{kind} {got!r:.50}", "DataLoader(data_set, batch_size=64, shuffle=True) makes them"
    return f"expected {expected}, got {came}; {way}"
