"""What the command prints: a bar while it works, then the result."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from probdefense.progress import progress_bar
from probdefense.study import wording
from probdefense.study.job import Result

NARROW, WIDE = 80, 120
"""Columns of the text, whatever the terminal has."""


@contextmanager
def progress(total: int, first: bool) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """One bar with the time left for a whole job; without a terminal, a line whenever something starts.

    Args:
        total: Steps of the job.
        first: Whether this process is the one that speaks.

    Yields:
        A function that gets a line, and one to call after every step.
    """
    if not first:
        yield _silent, _still
    elif not sys.stderr.isatty():
        yield _say, _still
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with progress_bar("", None), Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("preparing", total=total)
            yield (
                lambda line: bar.update(task, description=line.partition(":")[0]),
                lambda: bar.advance(task),
            )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _silent(line: str) -> None:
    """Says nothing."""


def _still() -> None:
    """Shows nothing."""


def show(result: Result, verbose: bool = False) -> None:
    """Prints a result for people; with `verbose` every pair, note and piece of advice."""
    print("\n".join(wording.lines(result, width(), verbose)))


def width() -> int:
    """How wide the text is."""
    return min(max(shutil.get_terminal_size((NARROW, 24)).columns, NARROW), WIDE)
