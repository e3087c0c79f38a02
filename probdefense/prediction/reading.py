"""Data as batches in the order given, whatever form they have: tensors, a data set or a loader."""

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from probdefense.prediction.drawing import ROWS
from probdefense.types import Data, Inputs, Labels
from probdefense.validation import check_examples, check_inputs, check_like


def batches(data: Data, ordered: bool = False) -> Iterator[tuple[Inputs, Labels]]:
    """Batches ``(x, y)`` in the order given; with `ordered` that order must be the same every time.

    Raises:
        TypeError: neither tensors nor a data set nor a loader.
        ValueError: a loader that shuffles, or batches of something else than pairs.
    """
    if isinstance(data, tuple) and not all(isinstance(part, tuple | list) for part in data):
        yield check_examples(data)
        return
    first = None
    for batch in _opened(
        data, ordered, "(x, y), a data set or a loader of batches", "give a pair of tensors"
    ):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            came = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
            raise ValueError(
                f"expected batches (x, y), got {came}; wrap the data so that every batch is a pair of images "
                "and labels"
            )
        x, y = check_examples(batch)
        first = x[:1] if first is None else first
        yield check_like(x, first, "every batch"), y


def inputs(data: Inputs | Data) -> Iterator[Inputs]:
    """Batches of inputs in the order given; labels may stand beside them and are not looked at.

    Raises:
        TypeError: neither inputs nor a data set nor a loader.
        ValueError: bad inputs, a loader that shuffles, or no batch at all.
    """
    if isinstance(data, Tensor) or _is_pair(data):
        yield check_inputs(data if isinstance(data, Tensor) else data[0])  # type: ignore[index]
        return
    first = None
    for batch in _opened(data, True, "x, a data set or a loader of batches", "convert with torch.as_tensor"):
        x = check_inputs(batch[0] if isinstance(batch, tuple | list) and batch else batch)
        first = x[:1] if first is None else first
        yield check_like(x, first, "every batch")
    if first is None:
        raise ValueError("expected at least one batch, got an empty loader; look at its data")


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)


def _opened(data: Any, ordered: bool, wanted: str, way: str) -> Iterable[Any]:
    """A data set or a loader as batches.

    Raises:
        TypeError: neither.
        ValueError: a loader that shuffles, where that matters.
    """
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size=ROWS, generator=torch.Generator())  # its own: a loader draws
    if isinstance(data, DataLoader) and ordered:
        _refuse_shuffling(data)
    arrays = isinstance(data, Tensor) or hasattr(data, "__array__")
    if arrays or isinstance(data, str | dict) or not isinstance(data, Iterable):
        raise TypeError(f"expected {wanted}, got {type(data).__name__}; {way}")
    return _arrays(data)


def _arrays(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader; a data set of pictures, which none puts together, is refused by that name."""
    try:
        yield from batches
    except TypeError as error:
        if "default_collate" not in str(error) or "PIL." not in str(error):
            raise
        raise TypeError(
            "expected a data set of tensors, got one of PIL images; give it the transform "
            "torchvision.transforms.ToTensor()"
        ) from error


def _refuse_shuffling(loader: DataLoader) -> None:
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler.sampler  # type: ignore[attr-defined]
    ordered = isinstance(sampler, SequentialSampler) or type(sampler).__name__ == "_InfiniteConstantSampler"
    if not ordered:
        raise ValueError(
            f"expected a loader that keeps the order of its data, got one with a {type(sampler).__name__}; "
            "the draws of a verdict belong to the numbers of the examples: make it with shuffle=False"
        )
    batches: Any = sampler if loader.batch_sampler is None else loader.batch_sampler
    left = (
        len(sampler) % batches.batch_size
        if getattr(batches, "drop_last", False) and isinstance(sampler, Sized)
        else 0
    )
    if left:
        raise ValueError(
            f"expected a loader of all its data, got one that leaves out the last {left} of them; make it "
            "with drop_last=False"
        )
