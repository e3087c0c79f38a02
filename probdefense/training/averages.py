r"""Averages of the weights that training walks through: flatter than its last step, at no extra gradient.

$$ \bar w_t = \bar w_{t-1} + a_t\, (w_t - \bar w_{t-1}), \qquad
   a_t = \max(1 - \beta,\; 9 / (9 + t)) \text{ (EMA, by steps)}, \quad a_t = 1/t \text{ (SWA, by epochs)} $$

All parameters of a defense are averaged, those of its guide included, and its running statistics.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probdefense.validation import check_count, check_share


@dataclass(frozen=True)
class Average:
    """Which average of the weights `fit` leaves behind; made by `ema` or `swa`.

    Attributes:
        decay: What a step leaves of the average at least; 1 for the plain average of epochs.
        start: Epochs before the first that counts; None to average steps, from the first.
    """

    decay: float
    start: int | None = None

    def share(self, count: int) -> float:
        """What the weights that are taken in as number `count` contribute."""
        return 1 / count if self.start is not None else max(1 - self.decay, 9 / (9 + count))


def ema(decay: float = 0.99) -> Average:
    r"""The exponential average of steps, $\bar w \leftarrow \beta \bar w + (1 - \beta) w$ after each.

    Early on it forgets faster, as the formula above says: it looks back over a tenth of the steps so far
    at most, so a short training is not averaged with where it began.

    Args:
        decay: $\beta$ in (0, 1); the average looks back about $1 / (1 - \beta)$ steps.

    Returns:
        What ``fit(average=)`` takes.

    Raises:
        ValueError: `decay` outside (0, 1).

    References:
        Polyak and Juditsky, 1992, [Acceleration of stochastic approximation by
        averaging](https://doi.org/10.1137/0330046)

    Examples:
        >>> import probdefense as pd
        >>> batches = [(torch.rand(8, 4), torch.zeros(8).long())]
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> _ = pd.fit(net, batches, epochs=2, average=ema(0.9), progress=False)
    """
    return Average(check_share("decay", decay))


def swa(start: int) -> Average:
    """The plain average of the weights at the end of each epoch, from the epoch after `start` on.

    Running statistics of BatchNorm are averaged likewise; `recalibrate` takes those of the averaged
    weights anew.

    Args:
        start: Epochs that do not count.

    Returns:
        What ``fit(average=)`` takes.

    Raises:
        TypeError: `start` is no whole number.
        ValueError: a negative one.

    References:
        Izmailov et al., 2018, [Averaging Weights Leads to Wider Optima and Better
        Generalization](https://arxiv.org/abs/1803.05407)

    Examples:
        >>> swa(30)
        Average(decay=1.0, start=30)
    """
    return Average(1.0, check_count("start", start, least=0))


def check_average(average: Any, epochs: int) -> None:
    """Refuses, before any work, what is no average or one that would begin after the end.

    Raises:
        TypeError: something else.
        ValueError: no epoch is left to average.
    """
    if average is None:
        return
    if not isinstance(average, Average):
        raise TypeError(
            f"expected average=training.ema(decay) or training.swa(start), got {type(average).__name__}"
        )
    if average.start is not None and average.start >= epochs:
        raise ValueError(
            f"expected swa(start) with start < epochs, got start={average.start} of {epochs} epochs, which "
            "leaves nothing to average; begin earlier or train longer"
        )


class Mean:
    """The average of one training, beside the weights that move."""

    def __init__(self, average: Average | None, defense: Any):
        state = {} if average is None else defense.state_dict()
        moving = {t.data_ptr(): t for t in state.values() if isinstance(t, Tensor) and t.is_floating_point()}
        self.average, self.weights = average, list(moving.values())
        self.values: list[Tensor] = []
        self.count = 0

    def after_step(self) -> None:
        """Takes in the weights of a step."""
        if self.average is not None and self.average.start is None:
            self._take()

    def after_epoch(self, epoch: int) -> None:
        """Takes in the weights of an epoch, counted from 0."""
        if self.average is not None and self.average.start is not None and epoch >= self.average.start:
            self._take()

    @torch.no_grad()
    def _take(self) -> None:
        self.count += 1
        if self.average is None or self.count == 1:
            self.values = [weight.detach().clone() for weight in self.weights]
            return
        share = self.average.share(self.count)
        for value, weight in zip(self.values, self.weights, strict=True):
            value.lerp_(weight, share)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, the defense has the averaged weights; afterwards those that training goes on with."""
        walked = [weight.detach().clone() for weight in self.weights]
        self.keep()
        try:
            yield
        finally:
            _put(walked, self.weights)

    def keep(self) -> None:
        """Leaves the average in the defense, if there is one yet."""
        _put(self.values, self.weights[: len(self.values)])


@torch.no_grad()
def _put(values: list[Tensor], weights: list[Tensor]) -> None:
    for value, weight in zip(values, weights, strict=True):
        weight.copy_(value)
