"""When a learning-rate schedule moves: after every step, or after every epoch, with a loss or without."""

from typing import Any, NamedTuple

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, ReduceLROnPlateau

from probdefense.training.validation import Validation


class PerStep(NamedTuple):
    """Marks a torch schedule as one that counts steps, not epochs.

    `OneCycleLR` and `CyclicLR` count steps without it.

    Attributes:
        schedule: A torch learning-rate scheduler.

    Examples:
        >>> from torch.optim.lr_scheduler import LinearLR
        >>> net = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        >>> warm_up = PerStep(LinearLR(optimizer, start_factor=0.1, total_iters=2))
        >>> import probdefense as pd
        >>> batches = [(torch.rand(8, 4), torch.zeros(8).long())] * 2
        >>> _ = pd.fit(pd.deterministic(net), batches, epochs=1, optimizer=optimizer, schedule=warm_up)
        >>> optimizer.param_groups[0]["lr"]
        1.0
    """

    schedule: Any


class Pace:
    """A schedule that knows when it moves."""

    def __init__(self, schedule: Any):
        marked = isinstance(schedule, PerStep)
        self.schedule = schedule.schedule if marked else schedule
        self.by_step = marked or isinstance(self.schedule, OneCycleLR | CyclicLR)

    def after_step(self) -> None:
        """Moves what counts steps."""
        if self.by_step:
            self.schedule.step()

    def after_epoch(self, loss: float) -> None:
        """Moves what counts epochs; one that waits for a plateau sees the loss."""
        if self.schedule is None or self.by_step:
            return
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(loss)
        else:
            self.schedule.step()

    def check(self, optimizer: Optimizer | None, total: int | None, validation: Any) -> None:
        """Refuses, before any work, a schedule that would move nothing, the wrong way, or too far.

        Args:
            optimizer: What was passed to `fit`.
            total: Steps of the training, None if unknown.
            validation: What it will see of an epoch instead of its loss, or None.

        Raises:
            TypeError: not a schedule.
            ValueError: of another optimizer, or made for another number of steps.
        """
        schedule, kind = self.schedule, type(self.schedule).__name__
        if schedule is None:
            return
        if not callable(getattr(schedule, "step", None)) or isinstance(schedule, type | Optimizer):
            raise TypeError(
                f"expected schedule as a torch learning-rate scheduler, got {kind} {schedule!r:.60}; make "
                "one of torch.optim.lr_scheduler from the optimizer"
            )
        if optimizer is None or getattr(schedule, "optimizer", optimizer) is not optimizer:
            raise ValueError(
                f"{kind} moves the rate of another optimizer, so it would change nothing here; pass the one "
                "that it was made for as optimizer="
            )
        if isinstance(schedule, ReduceLROnPlateau) and schedule.mode == "max" and validation is None:
            raise ValueError(
                "expected ReduceLROnPlateau with mode='min', because it watches the loss of the epoch, got "
                "'max'; pass what is to rise as validation="
            )
        rises = isinstance(validation, Validation)
        if isinstance(schedule, ReduceLROnPlateau) and schedule.mode == "min" and rises:
            raise ValueError(
                "expected ReduceLROnPlateau with mode='max', because it watches what is to rise, got 'min'"
            )
        steps = getattr(schedule, "total_steps", None)
        if self.by_step and steps is not None:
            _check_steps(kind, steps - schedule.last_epoch, total)


def _check_steps(kind: str, left: int, total: int | None) -> None:
    if total is None:
        raise ValueError(
            f"{kind} needs the number of steps, and this loader has no length; give its data set a __len__, "
            "or use a schedule by epochs"
        )
    if total > left:
        raise ValueError(
            f"expected {kind} to have {total} steps left, epochs times batches, got {left}; it moves after "
            f"every step: make it with total_steps={total}"
        )
