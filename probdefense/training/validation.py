"""Validation during training: a number after every epoch, the best weights by it, and when to stop."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from probdefense.logits.rules import mean_prob, verdicts
from probdefense.processes import Processes
from probdefense.rng import derive, forked
from probdefense.training.batches import Batches, batches, check_loader
from probdefense.types import Attack, Inputs, Labels
from probdefense.validation import check_attack, check_count, check_examples, check_function

ROWS = 256
"""Examples at a time."""


@dataclass(frozen=True)
class Validation:
    """What is to rise from epoch to epoch: the weights of the best one are left at the end.

    On data it is the accuracy of the mean probability, the same draws after every epoch; with an attack it
    is that under attack, on draws that the attack has not seen. Numbers on which the weights were chosen are
    too good: report those of other data.

    Args:
        measure: ``(x, y)``, a data set or a loader; or ``measure(defense) -> number``, the larger the better.
        patience: Epochs without a new best number after which training stops; None to go on.
        attack: ``attack(logits_fn, x, y) -> x_adv``, of data.
        num_samples: Draws behind an answer, on data.

    Raises:
        TypeError: neither data nor a function, or an attack that cannot be called.
        ValueError: `patience` or `num_samples` below 1, bad data, or an attack without data.

    Examples:
        >>> import probdefense as pd
        >>> x, y = torch.rand(8, 4), torch.zeros(8).long()
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> watched = Validation((x, y), attack=partial(pd.attacks.fgsm, eps=0.1), patience=2)
        >>> history = pd.fit(net, [(x, y)], epochs=3, validation=watched, progress=False)
        >>> watched.number(net) == max(history.validation)
        True
    """

    measure: Any
    patience: int | None = None
    attack: Attack | None = None
    num_samples: int = 10

    def __post_init__(self) -> None:
        if self.patience is not None:
            check_count("patience", self.patience)
        check_count("num_samples", self.num_samples)
        if self.attack is not None:
            check_attack(self.attack)
            if callable(self.measure):
                raise ValueError("expected attack= together with data; a function attacks the defense itself")
        if callable(self.measure):
            check_function("validation", self.measure, "defense")
        elif isinstance(self.measure, tuple):
            check_examples(self.measure)
        elif not isinstance(self.measure, Dataset):
            check_loader(self.measure)

    def number(self, defense: Any, processes: Processes | None = None) -> float:
        """What is to rise, of a defense.

        Raises:
            TypeError: the function returned no number.
        """
        processes = processes or Processes()
        if callable(self.measure):
            return processes.from_first(_number(self.measure(defense)))
        device, right, seen = next(defense.parameters()).device, 0, 0
        with forked(0, device):
            for number, (x, y) in enumerate(batches(self._loader(), device)):
                if number % processes.world == processes.rank:
                    with forked(derive(0, "validation", number), device):
                        right += int(self._correct(defense, x, y).sum())
                    seen += len(x)
        total, of = processes.summed([right, seen])
        return total / of

    def _loader(self) -> Batches:
        if isinstance(self.measure, tuple):
            return DataLoader(TensorDataset(*self.measure), ROWS)
        return DataLoader(self.measure, ROWS) if isinstance(self.measure, Dataset) else self.measure

    def _correct(self, defense: Any, x: Inputs, y: Labels) -> Tensor:
        points = x if self.attack is None else self.attack(defense, x, y)
        with torch.no_grad():
            return verdicts(mean_prob, defense(points, self.num_samples), y)


@dataclass
class Watch:
    """A validation under way: the best number so far, its weights, and how long ago it was.

    A plain function is recorded; it chooses nothing and stops nothing.
    """

    validation: Any
    best: float | None = None
    weights: dict[str, Any] = field(default_factory=dict)
    since: int = 0

    def look(self, defense: Any, processes: Processes) -> float:
        """The number of a defense, whose weights are kept if it is the best."""
        if not isinstance(self.validation, Validation):
            return processes.from_first(_number(self.validation(defense)))
        number = self.validation.number(defense, processes)
        if self.best is None or number > self.best:
            self.best, self.since = number, 0
            self.weights = {name: _copy(value) for name, value in defense.state_dict().items()}
        else:
            self.since += 1
        return number

    @property
    def lost_patience(self) -> bool:
        """Whether it is time to stop."""
        patience = self.validation.patience if isinstance(self.validation, Validation) else None
        return patience is not None and self.since >= patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"best": self.best, "weights": self.weights, "since": self.since}


def check_validation(validation: Any) -> None:
    """Refuses what is neither a `Validation` nor a function of a defense."""
    if validation is not None and not isinstance(validation, Validation):
        check_function("validation", validation, "defense")


def _number(found: Any) -> float:
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"expected validation(defense) to return one number, got {type(found).__name__}; return what is "
            "to be watched"
        ) from error


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
