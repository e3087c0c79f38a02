"""Progress with the time left, on stderr: it appears after two seconds and goes when the work is done."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")

_PATIENCE = 2.0
_open = False


@contextmanager
def progress_bar(label: str, total: int | None, show: bool = True) -> Iterator[Callable[[], None]]:
    """Yields a function to call once per finished unit; inside another bar it stays silent."""
    global _open
    if not show or _open or not sys.stderr.isatty():
        yield lambda: None
        return
    start, done, bar = time.monotonic(), 0, None
    _open = True

    def advance() -> None:
        nonlocal done, bar
        done += 1
        if bar is None and time.monotonic() - start > _PATIENCE:
            bar = _bar()
            bar.add_task(label, total=total)
            bar.start()
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done)

    try:
        yield advance
    finally:
        _open = False
        if bar is not None:
            bar.stop()


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Yields the items, with a bar while they last."""
    length = len(items) if hasattr(items, "__len__") else total  # type: ignore[arg-type]
    with progress_bar(label, length) as advance:
        for item in items:
            yield item
            advance()


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
