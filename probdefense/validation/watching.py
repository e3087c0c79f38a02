"""Checks of numbers that do not make the host wait for a device.

On a CPU a check looks at once. On a device it leaves a flag there; whoever runs a loop opens a ledger, and
reads all flags at its end, in one transfer.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def immediate(tensor: Tensor) -> bool:
    """Whether a number of this tensor can be looked at without waiting."""
    return tensor.device.type == "cpu"


def fetched(values: Tensor) -> list[float]:
    """The numbers of a vector on the host: the one transfer of a loop."""
    return values.cpu().tolist()


EXPORTING = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
"""Whether ``torch.export`` runs; torch before 2.7 does not tell it from ``torch.compile``."""


class Ledger:
    """Flags on a device with the errors that they stand for."""

    def __init__(self) -> None:
        self.flags: list[Tensor] = []
        self.errors: list[Callable[[], Exception]] = []

    def note(self, fine: Tensor, error: Callable[[], Exception]) -> None:
        """Keeps a flag, and how to make the error."""
        self.flags.append(fine.detach().reshape(()))
        self.errors.append(error)

    def read(self, numbers: Sequence[Tensor] = ()) -> list[float]:
        """Numbers of the device, read with the flags.

        Raises:
            Exception: that of the first flag which is down.
        """
        flags, errors = self.flags, self.errors
        self.flags, self.errors = [], []
        parts = [number.detach().reshape(()) for number in numbers] + flags
        parts = [part.to(torch.float32 if part.device.type == "mps" else torch.float64) for part in parts]
        found = fetched(torch.stack(parts)) if parts else []
        for flag, error in zip(found[len(numbers) :], errors, strict=True):
            if not flag:
                raise error()
        return found[: len(numbers)]


_OPEN = threading.local()


@contextmanager
def ledger() -> Iterator[Ledger]:
    """Checks of the block are read at its end; inside another one, at the end of that."""
    outer = getattr(_OPEN, "ledger", None)
    if outer is not None:
        yield outer
        return
    _OPEN.ledger = found = Ledger()
    try:
        yield found
        found.read()
    finally:
        _OPEN.ledger = None


def open_ledger() -> Ledger:
    """The ledger of the block that runs, or an empty one."""
    return getattr(_OPEN, "ledger", None) or Ledger()


def deferred(tensor: Tensor) -> bool:
    """Whether numbers of this tensor are looked at when a ledger is read, or never: a graph has none."""
    return EXPORTING() or (getattr(_OPEN, "ledger", None) is not None and not immediate(tensor))


def require(fine: Tensor, error: Callable[[], Exception]) -> None:
    """Raises an error where a flag is down: now, or when the ledger is read.

    Args:
        fine: Bool, one element.
        error: Makes the error; called only if it is raised.
    """
    if EXPORTING():
        return  # a graph in the making has no numbers yet
    if deferred(fine):
        _OPEN.ledger.note(fine, error)
    elif not bool(fine):
        raise error()
