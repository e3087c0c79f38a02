"""Several processes that do one job together, seen through Lightning Fabric; one alone is the least."""

import atexit
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class Processes:
    """The processes of a job.

    Args:
        fabric: A `lightning_fabric.Fabric` that has been launched, or None for this process alone.

    Raises:
        TypeError: something else.
        ValueError: one that has not been launched.
    """

    def __init__(self, fabric: Any = None):
        needed = ("world_size", "global_rank", "setup_module", "no_backward_sync")
        if fabric is not None and not all(hasattr(fabric, name) for name in needed):
            raise TypeError(
                f"expected fabric as a lightning_fabric.Fabric, got {type(fabric).__name__}; make one with "
                "Fabric(accelerator='auto', devices='auto', strategy='ddp')"
            )
        self.fabric = fabric
        self.world: int = 1 if fabric is None else fabric.world_size
        self.rank: int = 0 if fabric is None else fabric.global_rank
        if self.world > 1 and not torch.distributed.is_initialized():
            raise ValueError(
                f"expected a Fabric of {self.world} processes that talk to each other, got one that has not "
                "been launched; call fabric.launch() first"
            )
        if self.world > 1:
            leave_at_exit()

    def gathered(self, item: Any) -> list[Any]:
        """What every process has, in the order of their ranks."""
        if self.world == 1:
            return [item]
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, item)
        return found

    def from_first(self, item: Any) -> Any:
        """What the first process has."""
        if self.world == 1:
            return item
        found = [item]
        torch.distributed.broadcast_object_list(found, src=0, device=self.fabric.device)
        return found[0]

    def summed(self, values: Sequence[float]) -> list[float]:
        """Numbers added up over all processes."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.fabric.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their mean over all processes."""
        for tensor in tensors if self.world > 1 else ():
            torch.distributed.all_reduce(tensor)
            tensor /= self.world

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Inside the block the first process runs before the others."""
        if self.rank > 0:
            self.gathered(None)
        try:
            yield
        finally:
            if self.rank == 0:
                self.gathered(None)

    def wrapped(self, module: nn.Module) -> nn.Module:
        """The module whose backward pass averages gradients over all processes."""
        return module if self.fabric is None else self.fabric.setup_module(module)

    def unsynced(self, module: nn.Module, off: bool) -> AbstractContextManager[None]:
        """Inside the block, with `off`, gradients stay those of this process."""
        return self.fabric.no_backward_sync(module) if off and self.world > 1 else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss."""
        if self.fabric is None:
            loss.backward()
        else:
            self.fabric.backward(loss)

    @property
    def device(self) -> torch.device | None:
        """Where this process computes; None to leave tensors where they are."""
        return None if self.fabric is None else self.fabric.device


def leave_at_exit() -> None:
    """Has this process leave its group at exit: threads of gloo, left alone, may abort a job that is done."""
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
