"""A training under way: what moves while it lasts, which a checkpoint holds, and how an epoch goes."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor

from probdefense.processes import Processes
from probdefense.training.averages import Mean
from probdefense.training.batches import Batches, batches
from probdefense.training.checkpoints import Checkpoints
from probdefense.training.checks import check_size
from probdefense.training.counters import counters
from probdefense.training.descent import Descent
from probdefense.training.history import History, Meter
from probdefense.training.interrupts import Interrupts
from probdefense.training.schedules import Pace
from probdefense.training.streams import Streams
from probdefense.training.validation import Watch
from probdefense.types import Inputs, Labels
from probdefense.validation import watching

Callbacks = Sequence[Callable[[int, History], Any]]


@dataclass
class Run:
    """The parts of a training, and its place: epoch, batch of the epoch, batches and steps so far."""

    defense: Any
    loader: Batches
    descent: Descent
    pace: Pace
    mean: Mean
    watch: Watch
    callbacks: Callbacks
    processes: Processes
    streams: Streams
    checkpoints: Checkpoints | None
    settings: dict[str, str]
    size: int | None
    total: int | None
    advance: Callable[[], None]
    history: History = field(default_factory=History)
    meter: Meter = field(default_factory=Meter)
    interrupts: Interrupts = field(default_factory=Interrupts)
    begun: list[Tensor] = field(default_factory=list)
    epoch: int = 0
    batch: int = 0
    done: int = 0
    steps: int = 0
    stopped: bool = False

    def __post_init__(self) -> None:
        for callback in self.callbacks:
            if hasattr(callback, "begin"):
                callback.begin(self.defense)

    def go(self, epochs: int) -> None:
        """Trains until so many epochs are done, or something asks to stop; leaves the weights chosen."""
        while self.epoch < epochs and not self.stopped:
            self._train_epoch()
            if self.checkpoints is None:
                self._end_epoch()
            else:
                self._end_epoch_kept()
        if self.watch.weights:
            self.defense.load_state_dict(self.watch.weights)
        else:
            self.mean.keep()

    def _train_epoch(self) -> None:
        self.defense.train()
        with watching.ledger() as checks, self.meter.watching(self.defense):
            for x, y in self._left():
                progress = self.done / self.total if self.total else None
                loss = self.descent.add(x, y, (self.epoch, self.done), progress)
                # own programs tell the size of their data in their first pass, and no step is taken yet
                check_size(self.defense, self.size, self.meter.examples + len(x))
                self.meter.add(loss, len(x))
                self.batch += 1
                self.done += 1
                self.advance()
                if self.descent.complete:
                    self._step()
            if self.descent.count:
                self._step()
            self.meter.settle(checks)

    def _left(self) -> Iterator[tuple[Inputs, Labels]]:
        """The batches of this epoch that have not been trained yet, in the order in which they came."""
        now = self.streams.state()
        if self.batch:
            self.streams.restore(self.begun)
        self.begun = self.streams.state()
        left = batches(self.loader, next(self.defense.parameters()).device)
        if self.batch:
            next(islice(left, self.batch - 1, None), None)
            self.streams.restore(now)
        return left

    def _step(self) -> None:
        self.meter.add_step(self.descent.step())
        self.pace.after_step()
        self.mean.after_step()
        self.steps += 1
        if self.checkpoints is None:
            return
        asked = any(self.processes.gathered(self.interrupts.asked))
        if asked or (self.checkpoints.every and self.steps % self.checkpoints.every == 0):
            self.meter.settle(watching.open_ledger())
            self.save()
        if asked:
            raise KeyboardInterrupt

    def _end_epoch_kept(self) -> None:
        """Ends an epoch between two checkpoints, so that an interrupted validation starts again."""
        if self.watch.validation is not None or self.callbacks:
            self.save()
            with self.interrupts.raised():
                self._end_epoch()
        else:
            self._end_epoch()
        self.save()

    def _end_epoch(self) -> None:
        """Files the numbers of the epoch, validates, moves a schedule that counts epochs, and calls back."""
        self.mean.after_epoch(self.epoch)
        self.meter.file(self.history, self.descent.optimizer.param_groups[0]["lr"], self.processes)
        watched = self.history.loss[-1]
        with self.mean.shown():
            if self.watch.validation is not None:
                watched = self.watch.look(self.defense.eval(), self.processes)
                self.history.validation.append(watched)
            self.pace.after_epoch(watched)
            asked = [callback(self.epoch, self.history) is True for callback in self.callbacks]
        self.stopped = any(self.processes.gathered(any(asked))) or self.watch.lost_patience
        self.epoch, self.batch, self.meter = self.epoch + 1, 0, Meter()

    def save(self) -> None:
        """Writes a checkpoint."""
        own = self.processes.gathered([self.streams.state(), self.begun, asdict(self.meter)])
        if self.checkpoints is not None and self.processes.rank == 0:
            state = {"settings": self.settings, "own": own, **self._state()}
            self.checkpoints.write(self.epoch, self.batch, state)

    def _state(self) -> dict[str, Any]:
        """Everything that moves and is the same in all processes."""
        schedule = self.pace.schedule
        return {
            "defense": self.defense.state_dict(),
            "optimizer": self.descent.optimizer.state_dict(),
            "schedule": None if schedule is None else schedule.state_dict(),
            "average": {"values": self.mean.values, "count": self.mean.count},
            "best": self.watch.state(),
            "objective": [part.state_dict() for part in counters(self.descent.plan.objective)],
            "callbacks": [part.state_dict() for part in counters(list(self.callbacks))],
            "history": asdict(self.history),
            "place": [self.epoch, self.batch, self.done, self.steps, self.stopped],
        }

    def resume(self) -> None:
        """Goes back to the newest checkpoint, if there is one.

        Raises:
            ValueError: it is of another training, naming the difference, or its file is damaged.
        """
        if self.checkpoints is None or (found := self.checkpoints.latest()) is None:
            return
        known = found["settings"]
        differ = [name for name in {**known, **self.settings} if known.get(name) != self.settings.get(name)]
        if differ:
            raise ValueError(
                f"the checkpoints in {self.checkpoints.folder} are of another training: "
                f"{', '.join(differ)} differ; give this one a folder of its own"
            )
        self.epoch, self.batch, self.done, self.steps, self.stopped = found["place"]
        self.history = History(**found["history"])
        self._restore(found)
        states, self.begun, meter = found["own"][self.processes.rank]
        self.meter = Meter(**meter)
        self.streams.restore(states)

    def _restore(self, found: dict[str, Any]) -> None:
        device = next(self.defense.parameters()).device
        self.defense.load_state_dict(found["defense"])
        self.descent.optimizer.load_state_dict(found["optimizer"])
        if self.pace.schedule is not None:
            self.pace.schedule.load_state_dict(found["schedule"])
            if self.steps:  # before the restart, which torch does not know and would warn of
                self.descent.optimizer._opt_called = True  # type: ignore[attr-defined]
        self.mean.values = [value.to(device) for value in found["average"]["values"]]
        self.mean.count = found["average"]["count"]
        self.watch.best, self.watch.since = found["best"]["best"], found["best"]["since"]
        self.watch.weights = found["best"]["weights"]
        for part, state in zip(counters(self.descent.plan.objective), found["objective"], strict=True):
            part.load_state_dict(state)
        for part, state in zip(counters(list(self.callbacks)), found.get("callbacks", ()), strict=False):
            part.load_state_dict(state)


def settings_of(defense: Any, seed: int | None, average: Any, descent: Descent, pace: Pace) -> dict[str, str]:
    """What a training that goes on has to share with the one before, as text."""
    plan, optimizer = descent.plan, descent.optimizer
    moved = ("params", "lr", "momentum", "betas")
    groups = [
        {name: value for name, value in group.items() if name not in moved}
        | {"initial_lr": group.get("initial_lr", group["lr"])}
        for group in optimizer.param_groups
    ]
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in defense.state_dict().items()}
    return {
        "defense": hashlib.sha256(str(shapes).encode()).hexdigest(),
        "seed": str(seed),
        "average": str(average),
        "optimizer": f"{type(optimizer).__name__} {groups}",
        "schedule": type(pace.schedule).__name__,
        "max_grad_norm": str(plan.max_grad_norm),
        "autocast": str(plan.autocast),
        "accumulate": str(plan.accumulate),
        "processes": str(descent.processes.world),
        "weight_draws": plan.weight_draws,
    }
