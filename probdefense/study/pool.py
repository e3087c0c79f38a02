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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from probdefense.data.scripts import FILES, run_file
from probdefense.progress import progress_bar

Item = TypeVar("Item")
Found = TypeVar("Found")


def cores() -> int:
    """How many processes the machine has room for."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, own // threads())


def threads() -> int:
    """The threads of one process."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return max(1, int(asked)) if asked.isdecimal() else 1


def apart(work: Callable[[Item], Found], items: Sequence[Item], processes: int) -> list[Found]:
    """``[work(item) for item in items]``, by so many processes; those in front start first.

    Args:
        work: A function of a module.
        items: What can be pickled, as the results.
        processes: 1 to stay in this one.

    Raises:
        ChildProcessError: a process was killed.
    """
    processes = min(processes, len(items))
    if processes <= 1:
        with steady():
            return [work(item) for item in items]
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload([work.__module__])  # imported once, for all
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(processes, context, _begin, (threads(), [*FILES.values()])) as pool:
        try:
            # bytes, because torch would pass tensors by shared memory, which small machines lack
            found = [pool.submit(_packed, work, pickle.dumps(item)) for item in items]
            return [pickle.loads(each.result()) for each in found]
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a process of the job was killed, perhaps for want of memory; use fewer at once: "
                "OMP_NUM_THREADS=4 makes them a quarter of the cores"
            ) from error
        except BaseException:
            for process in {*multiprocessing.active_children()} - others:
                process.terminate()
            raise


def _begin(count: int, files: Sequence[Path]) -> None:
    """Settles a new process: interruptions are the first one's business, and it ends with that one.

    Files of the user's run here too: what comes may be of their classes, or need their recipes.
    """
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
