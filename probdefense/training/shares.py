"""A loader for several processes: each takes its rows of every batch, none twice and none left out.

So the batch that is trained is the loader's, whatever the number of processes. A sampler that pads the data
until all processes have equally many would repeat examples.
"""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from probdefense.processes import Processes
from probdefense.training.batches import Batches, checked
from probdefense.types import Inputs, Labels


def shared(loader: Any, processes: Processes) -> Batches:
    """The loader of one process. A `DataLoader` loads its rows alone, in the order of the first process.

    Any other loader is gone through by every process, and has to give all of them the same batches.
    """
    if processes.world == 1:
        return loader
    of_rows = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if not of_rows or loader.batch_sampler is None:
        return Rows(loader, processes)
    names = (
        "num_workers",
        "collate_fn",
        "pin_memory",
        "timeout",
        "worker_init_fn",
        "multiprocessing_context",
        "generator",
        "prefetch_factor",
        "persistent_workers",
    )
    options: dict[str, Any] = {name: getattr(loader, name) for name in names}
    return DataLoader(loader.dataset, batch_sampler=Shares(loader.batch_sampler, processes), **options)


class Shares:
    """The rows of one process in the batches of a sampler, which the first process alone asks."""

    def __init__(self, batch_sampler: Any, processes: Processes):
        self.batch_sampler, self.processes = batch_sampler, processes

    def __iter__(self) -> Iterator[list[Any]]:
        """Rows of every batch.

        Raises:
            ValueError: a batch with fewer examples than processes, before the first step of the epoch.
        """
        first, world = self.processes.rank == 0, self.processes.world
        batches = [list(batch) for batch in self.batch_sampler] if first else None
        batches = self.processes.from_first(batches)
        for batch in batches:
            _check_size(len(batch), world)
        for batch in batches:
            yield batch[self.processes.rank :: world]

    def __len__(self) -> int:
        return len(self.batch_sampler)


class Rows:
    """The rows of one process in batches that every process loads."""

    def __init__(self, loader: Batches, processes: Processes):
        self.loader, self.processes = loader, processes

    def __iter__(self) -> Iterator[tuple[Inputs, Labels]]:
        """Rows of every batch.

        Raises:
            ValueError: a batch with fewer examples than processes.
        """
        for batch in self.loader:
            x, y = checked(batch)
            _check_size(len(x), self.processes.world)
            rows = slice(self.processes.rank, None, self.processes.world)
            yield x[rows], y[rows]


def _check_size(examples: int, world: int) -> None:
    if examples < world:
        raise ValueError(
            f"expected at least {world} examples in every batch, one for each process, got {examples}; use "
            "drop_last=True or another batch_size"
        )
