"""Files that are written whole or not at all."""

import difflib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

ROOM = 2**25
"""Bytes that a run needs: the files are a few million, and HDF5 dies on a full disk."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; moved there when the block has ended, removed when it failed.

    What is moved has reached the disk, so that even a power cut leaves the old file or the new one.

    Raises:
        OSError: it cannot be written, or `path` is there and no file, such as a folder or a device.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "there is something else than a file", str(path))
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def together(folder: Path) -> Iterator[Path]:
    """A place for several files; moved into `folder` when the block has ended, all removed when it failed."""
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as place:
        yield Path(place)
        for path in sorted(Path(place).iterdir()):
            path.replace(folder / path.name)


def reserve(folder: Path, size: int) -> None:
    """Writes so many bytes into a folder, made if needed, and takes them away again: quotas answer too.

    Raises:
        OSError: there is no room, or the folder cannot be written; folders that were made are gone again.
    """
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(size))
            file.flush()
    except OSError:
        for place in new:
            with suppress(OSError):  # it was not made, or another process has put something there
                place.rmdir()
        raise


def nearest(path: Path) -> str:
    """``"; did you mean FILE?"`` for the file of the same folder whose name is most like it; else empty.

    Examples:
        >>> nearest(Path("nowhere") / "net.pt")
        ''
    """
    beside = sorted(each.name for each in path.parent.iterdir()) if path.parent.is_dir() else []
    files = [name for name in beside if (path.parent / name).is_file()]
    like = difflib.get_close_matches(path.name, files, 1) or [n for n in files if Path(n).stem == path.name]
    return f"; did you mean {path.with_name(like[0])}?" if like and path.name else ""


def check_file(path: Path, what: str) -> None:
    """Refuses a path where there is no file to read, with what is there or what is nearest.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a folder is.

    Examples:
        >>> check_file(Path("nowhere/net.pt"), "trained weights")
        Traceback (most recent call last):
        ...
        FileNotFoundError: expected trained weights in nowhere/net.pt, got nothing: No such file
    """
    if path.is_dir():
        raise ValueError(f"expected {what} in a file, got the folder {path}; give a file in it")
    if not path.exists():
        raise FileNotFoundError(f"expected {what} in {path}, got nothing: No such file{nearest(path)}")


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """A hash of a header and of tensors on the CPU: a file in which a bit has changed is found by it."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
