"""Independent pieces of work in processes of their own, with the results of one process.

Every process computes with the same number of threads, one unless ``OMP_NUM_THREADS`` says otherwise, so
results do not depend on how many processes there are.
"""

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from probdefense.data.scripts import FILES, run_file
from probdefense.progress import progress_bar

Item = TypeVar("Item")
Found = TypeVar("Found")


def _nothing(*_: Any) -> None:
    """Does nothing."""


_teller: Callable[[Any], None] = _nothing


def cores() -> int:
    """How many processes the machine has room for."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, own // threads())


def threads() -> int:
    """The threads of one process."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return max(1, int(asked)) if asked.isdecimal() else 1


def apart(
    work: Callable[[Item], Found],
    items: Sequence[Item],
    processes: int,
    done: Callable[[int, Found], None] = _nothing,
    heard: Callable[[Any], None] = _nothing,
) -> list[Found]:
    """``[work(item) for item in items]``, by so many processes; those in front start first.

    Args:
        work: A function of a module.
        items: What can be pickled, as the results.
        processes: 1 to stay in this one.
        done: Gets the number of an item and its result as soon as it is there.
        heard: Gets what `tell` is called with inside.

    Raises:
        ChildProcessError: a process was killed.
    """
    global _teller
    processes = min(processes, len(items))
    if processes > 1:
        return _spread(work, items, processes, done, heard)
    before, _teller = _teller, heard
    found = []
    try:
        with steady():
            for number, item in enumerate(items):
                found.append(work(item))
                done(number, found[-1])
    finally:
        _teller = before
    return found


def tell(message: Any) -> None:
    """From inside some work, tells the process that asked for it."""
    _teller(message)


def _spread(
    work: Callable[[Item], Found],
    items: Sequence[Item],
    processes: int,
    done: Callable[[int, Found], None],
    heard: Callable[[Any], None],
) -> list[Found]:
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload([work.__module__])  # imported once, for all
    others, words = set(multiprocessing.active_children()), context.SimpleQueue()
    begin = (threads(), [*FILES.values()], words)
    with _listening(words, heard), ProcessPoolExecutor(processes, context, _begin, begin) as pool:
        try:
            # bytes, because torch would pass tensors by shared memory, which small machines lack
            running = {pool.submit(_packed, work, pickle.dumps(item)): n for n, item in enumerate(items)}
            found: dict[int, Found] = {}
            for each in as_completed(running):
                found[running[each]] = pickle.loads(each.result())
                done(running[each], found[running[each]])
            return [found[number] for number in range(len(items))]
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a process of the job was killed, perhaps for want of memory; use fewer at once: "
                "OMP_NUM_THREADS=4 makes them a quarter of the cores"
            ) from error
        except BaseException:
            for process in {*multiprocessing.active_children()} - others:
                process.terminate()
            raise


@contextmanager
def _listening(words: Any, heard: Callable[[Any], None]) -> Iterator[None]:
    """Inside, what other processes tell is heard."""

    def listen() -> None:
        while (word := words.get()) is not None:
            heard(word)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield
    finally:
        words.put(None)
        listener.join(1.0)


def _begin(count: int, files: Sequence[Path], words: Any) -> None:
    """Settles a new process: interruptions are the first one's business, and it ends with that one.

    Files of the user's run here too: what comes may be of their classes, or need their recipes.
    """
    global _teller
    _teller = words.put
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    torch.set_num_threads(count)
    for file in files:
        run_file(file)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _packed(work: Callable[[Any], Any], item: bytes) -> bytes:
    with progress_bar("", None):  # a bar that never advances keeps those inside silent
        return pickle.dumps(work(pickle.loads(item)))


@contextmanager
def steady() -> Iterator[None]:
    """Inside, torch has the threads of every process of a job; networks this small gain from no more."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)
