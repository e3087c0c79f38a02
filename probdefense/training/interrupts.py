"""Ctrl-C while a training is under way: the step that runs is finished first, so that it can be saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupts:
    """Notes Ctrl-C instead of raising at once; a second one is raised where it comes.

    Where the main thread does not run the training, nothing is changed: signals reach that thread alone.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Inside the block Ctrl-C is noted in `asked`."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._found = signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, self._found)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Inside the block, which is inside `noted`, Ctrl-C is raised at once; nothing is lost there."""
        if self.asked:
            raise KeyboardInterrupt
        if signal.getsignal(signal.SIGINT) != self._note:
            yield
            return
        signal.signal(signal.SIGINT, self._found)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._found)
