"""What training saw: the numbers of every epoch, and how they are gathered."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from probdefense.ops import exact
from probdefense.processes import Processes
from probdefense.tables import format_table, html_table
from probdefense.types import Labels, Step
from probdefense.validation import like_probabilities, warn_of_probabilities, watching
from probdefense.validation.watching import Ledger


@dataclass(repr=False)
class History:
    """What training saw, one number per epoch, averaged over its examples.

    Attributes:
        loss: The objective, nats per example.
        log_lik: Log-likelihood, nats per example, on what was trained (attacked inputs included).
        kl: KL over all sites, nats per data set.
        accuracy: Share of training forwards with the right class.
        validation: What `validation` returned; empty without it.
        learning_rate: Of the first group of parameters, in the last step.
        grad_norm: L2 norm of the gradient before it is clipped, averaged over steps.
        seconds: Wall time of training, without validation.
    """

    loss: list[float] = field(default_factory=list)
    log_lik: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __repr__(self) -> str:
        if not self.loss:
            return "History of no epoch"
        lists = [getattr(self, name) for name in ("loss", "accuracy")]
        loss, accuracy = (f"{values[0]:.4g} to {values[-1]:.4g}" for values in lists)
        about = f"History of {len(self.loss)} epochs: loss {loss} nats, accuracy {accuracy}"
        return f"{about}, {sum(self.seconds):.3g} seconds\n{format_table(self._rows, self._columns, ())}"

    def _repr_html_(self) -> str:
        return html_table(self._rows, self._columns, f"History of {len(self.loss)} epochs", percent=())

    @property
    def _columns(self) -> list[str]:
        return ["epoch", *(name for name, values in vars(self).items() if values)]

    @property
    def _rows(self) -> list[dict[str, Any]]:
        """One per epoch; lists that are shorter stand at the last epochs."""
        count = len(self.loss)
        lists = {name: [None] * (count - len(values)) + values for name, values in vars(self).items()}
        return [{"epoch": k + 1} | {name: values[k] for name, values in lists.items()} for k in range(count)]


def number(value: Tensor) -> Any:
    """On a CPU a number; on a device what will be one, so that nobody waits for it."""
    return float(value) if watching.immediate(value) else exact(value)


@dataclass
class Meter:
    """Sums over what one epoch has seen so far."""

    loss: float = 0.0
    log_lik: float = 0.0
    kl: float = 0.0
    accuracy: float = 0.0
    examples: int = 0
    forwards: int = 0
    grad_norm: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    probabilities: float = 0.0

    @contextmanager
    def watching(self, defense: Any) -> Iterator[None]:
        """Inside the block all training forwards are seen, and time is taken."""
        handle = defense.register_step_hook(self._see)
        begun = time.perf_counter() - self.seconds
        self._now = lambda: time.perf_counter() - begun
        try:
            yield
        finally:
            handle.remove()
            self.seconds = self._now()

    def _see(self, step: Step, y: Labels) -> None:
        size = len(step.log_lik)
        if not self.forwards:
            self.probabilities = number(like_probabilities(step.logits.detach()))
        self.forwards += size
        self.log_lik += number(step.log_lik.detach().sum())
        self.kl += size * number(sum((value.detach() for value in step.kl.values()), y.new_zeros(())))
        self.accuracy += number((step.logits.argmax(-1) == y).sum())

    def add(self, loss: Tensor, size: int) -> None:
        """Takes in the loss of a batch."""
        self.examples += size
        self.loss += size * number(loss.detach())
        self.seconds = self._now()

    def add_step(self, grad_norm: Tensor) -> None:
        """Takes in the gradient of a step."""
        self.grad_norm += number(grad_norm)
        self.steps += 1

    def settle(self, checks: Ledger) -> None:
        """Sums become numbers of the host, in the transfer in which the checks of the epoch are read.

        Raises:
            FloatingPointError: a loss was NaN or infinite.
        """
        names = [name for name, value in vars(self).items() if isinstance(value, Tensor)]
        for name, value in zip(names, checks.read([getattr(self, name) for name in names]), strict=True):
            setattr(self, name, value)

    def file(self, history: History, learning_rate: float, processes: Processes) -> None:
        """Adds the averages of the epoch to the history; warns of probabilities after the first one."""
        if self.probabilities and not history.loss:
            warn_of_probabilities("weakens the training", stacklevel=5)
        mine = asdict(self)
        names = ("loss", "log_lik", "kl", "accuracy", "examples", "forwards")
        total = dict(zip(names, processes.summed([mine[name] for name in names]), strict=True))
        history.loss.append(total["loss"] / total["examples"])
        for name in ("log_lik", "kl", "accuracy"):
            getattr(history, name).append(total[name] / max(total["forwards"], 1))
        history.learning_rate.append(learning_rate)
        history.grad_norm.append(self.grad_norm / max(self.steps, 1))
        history.seconds.append(self.seconds)
