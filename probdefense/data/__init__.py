"""Data sets in pixels [0, 1]: digits offline, the others through torchvision from a folder you name."""

import gzip
import importlib
import os
import zlib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from probdefense.validation import check_member

IDX = ("mnist", "fashion-mnist")
"""Data sets whose files need no torchvision to be read."""


class Split(NamedTuple):
    """A training and a test set."""

    train: TensorDataset
    test: TensorDataset


class Source(NamedTuple):
    """What to know of a data set: its torchvision class, image shape, classes and usual radius."""

    torchvision: str
    shape: tuple[int, int, int]
    eps: float
    about: str


SOURCES = {
    "digits": Source("", (1, 8, 8), 0.2, "1,797 handwritten digits of 8x8 pixels, part of scikit-learn"),
    "mnist": Source("MNIST", (1, 28, 28), 0.3, "70,000 handwritten digits of 28x28 pixels"),
    "fashion-mnist": Source("FashionMNIST", (1, 28, 28), 0.1, "70,000 articles of clothing, 28x28 pixels"),
    "cifar10": Source("CIFAR10", (3, 32, 32), 8 / 255, "60,000 color images of 32x32 pixels"),
    "stl10": Source("STL10", (3, 96, 96), 8 / 255, "13,000 color images of 96x96 pixels"),
}


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
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.as_tensor(labels, dtype=torch.int64)
    train, test = train_test_split(range(len(y)), test_size=360, stratify=labels, random_state=0)
    return Split(TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test]))


def load(name: str, root: str | os.PathLike[str] | None = None) -> Split:
    """A data set by name, as tensors in memory.

    Args:
        name: ``digits``, ``mnist``, ``fashion-mnist``, ``cifar10`` or ``stl10``.
        root: The folder that torchvision reads; the variable ``PROBDEFENSE_DATA`` by default. Absent
            data are downloaded there if a network is at hand.

    Returns:
        ``(train, test)``.

    Raises:
        ValueError: unknown name, no folder given, or files that hold something else.
        ImportError: the data set needs torchvision, whose build does not fit the installed torch.
        FileNotFoundError: the data are neither there nor to be downloaded; the message says what goes where.

    Examples:
        >>> len(load("digits").test)
        360
    """
    check_member("data set", name, SOURCES)
    if name == "digits":
        return digits()
    root = root or os.environ.get("PROBDEFENSE_DATA")
    if not root:
        raise ValueError(
            f"{name} needs a folder; pass --data-root (root=) or set PROBDEFENSE_DATA to the folder "
            "that holds, or may receive, the data"
        )
    return Split(*(_read(name, Path(root), train) for train in (True, False)))


def _read(name: str, root: Path, train: bool) -> TensorDataset:
    """One part of a data set: idx files are read as they lie there, the rest is torchvision's."""
    raw, part = root / SOURCES[name].torchvision / "raw", "train" if train else "t10k"
    paths = [raw / f"{part}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    if name in IDX and all(_lies_there(path) for path in paths):
        images, labels = (_idx(path) for path in paths)
        if len(images) != len(labels):
            raise ValueError(f"expected a label per image in {raw}, got {len(images)} and {len(labels)}")
        return TensorDataset(_pixels(images, name), labels.long())
    return _from_torchvision(name, root, train)


def _lies_there(path: Path) -> bool:
    return path.is_file() or path.with_name(path.name + ".gz").is_file()


def _idx(path: Path) -> Tensor:
    """The bytes of an idx file, packed or not, in the shape that its header gives."""
    packed = path.with_name(path.name + ".gz")
    try:
        content = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
        shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, 4 + 4 * content[3], 4)]
        return torch.frombuffer(bytearray(content[4 + 4 * len(shape) :]), dtype=torch.uint8).view(shape)
    except (OSError, EOFError, IndexError, ValueError, RuntimeError, zlib.error) as error:
        raise ValueError(f"expected an idx file in {path}, got something else or a part of one") from error


def _from_torchvision(name: str, root: Path, train: bool) -> TensorDataset:
    part = {"split": "train" if train else "test"} if name == "stl10" else {"train": train}
    absent = f"{name} is not in {root} and could not be downloaded; put {_expected(name)} there"
    try:
        kind = getattr(import_torchvision().datasets, SOURCES[name].torchvision)
    except ImportError as error:
        if name in IDX:
            raise FileNotFoundError(absent) from error
        raise
    try:
        found = kind(str(root), download=False, **part)
    except RuntimeError:
        try:
            found = kind(str(root), download=True, **part)
        except Exception as error:
            raise FileNotFoundError(absent) from error
    images = torch.as_tensor(found.data)
    labels = found.targets if hasattr(found, "targets") else found.labels
    return TensorDataset(_pixels(images, name), torch.as_tensor(labels, dtype=torch.int64))


def import_torchvision() -> ModuleType:
    """torchvision, or one sentence that says why not.

    Raises:
        ImportError: it is not there, or its build does not fit the installed torch.
    """
    try:
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"torchvision does not import beside torch {torch.__version__} ({error}); install the build that "
            "was made for this torch"
        ) from error


def _pixels(images: Tensor, name: str) -> Tensor:
    """Bytes in any layout to floats ``(batch, channels, height, width)`` in [0, 1]."""
    if images.dim() == 3:
        images = images.unsqueeze(1)
    elif images.shape[1:] != SOURCES[name].shape:
        images = images.permute(0, 3, 1, 2)
    return images.contiguous().to(torch.float32) / 255


def _expected(name: str) -> str:
    return {
        "mnist": "the four idx files in MNIST/raw",
        "fashion-mnist": "the four idx files in FashionMNIST/raw",
        "cifar10": "the python version in cifar-10-batches-py",
        "stl10": "the binary files in stl10_binary",
    }[name]
