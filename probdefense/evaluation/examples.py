"""The examples of an evaluation: a pair of tensors, a data set or a loader, read in the order given."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from probdefense.prediction.drawing import ROWS
from probdefense.types import Data, Inputs, Labels


def gather(data: Data) -> tuple[Inputs, Labels]:
    """All examples of ``(x, y)``, a data set or a loader, as two tensors.

    Raises:
        TypeError: none of these.
        ValueError: no examples.
    """
    if isinstance(data, tuple) and len(data) == 2:
        x, y = data
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return x, y
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size=ROWS)
    if not isinstance(data, Iterable):
        raise TypeError(f"expected (x, y), a data set or a loader of batches, got {type(data).__name__}")
    batches = [(x, y) for x, y in data]
    if not batches:
        raise ValueError("expected at least one batch (x, y), got an empty loader")
    return torch.cat([x for x, _ in batches]), torch.cat([torch.as_tensor(y) for _, y in batches])
