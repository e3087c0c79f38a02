"""What an attacker wants, and which of several points comes nearest to it."""

from typing import NamedTuple

import torch
from torch import Tensor

from probdefense.attacks.tools.gradient import climb
from probdefense.logits.losses import expected_cross_entropy
from probdefense.logits.rules import margins, mean_prob
from probdefense.ops import lp_norm
from probdefense.types import Inputs, Labels, Logits, LogitsFn, LossFn, Norm, Rule

SELECTION_DRAWS = 32
"""Fresh draws on which points are compared: not those that were climbed, nor those of a verdict."""


QUANTILE = 2.3263
"""Of the standard normal at 99 %."""

GROUPS = 8
"""Groups of draws that the jackknife leaves out in turn."""


class Goal(NamedTuple):
    """What is wanted of every example, any class but `y` or the class `target`, and how it is climbed.

    With `sure`, the given draws stand for others: wrong means that 99 % of verdicts are wrong.
    """

    y: Labels
    target: Labels | None = None
    loss: LossFn = expected_cross_entropy
    rule: Rule = mean_prob
    sure: bool = False

    def take(self, rows: slice | Tensor) -> "Goal":
        """The goal for some of the examples."""
        return self._replace(y=self.y[rows], target=None if self.target is None else self.target[rows])

    def climbed(self, logits: Logits) -> Tensor:
        """What is climbed, ``(samples, batch, classes) -> (batch,)``."""
        return climb(self.loss, self.y, self.target)(logits)

    def remaining(self, logits: Logits) -> Tensor:
        """How far the rule still is from the error wanted, ``(batch,)``; zero or less has reached it."""
        return self._margins(logits).mean(0) + self.slack(logits)

    def slack(self, logits: Logits) -> Tensor:
        """What must be added to a margin to be sure of it: the spread of a verdict, times 2.33.

        The spread is that of the verdicts themselves where the rule takes few draws, and the
        jackknife's over groups of draws where it takes them all.
        """
        logits = logits.detach()
        if not self.sure or len(logits) == 1:
            return torch.zeros((), dtype=logits.dtype, device=logits.device)
        rows = self._margins(logits)
        if len(rows) > 1:
            return QUANTILE * rows.std(0)
        groups = logits.split(max(1, len(logits) // GROUPS))
        without = [torch.cat([*groups[:k], *groups[k + 1 :]]) for k in range(len(groups))]
        partial = torch.stack([self._margins(part)[0] for part in without])
        return QUANTILE * ((len(groups) - 1) * partial.var(0, correction=0)).sqrt()

    def _margins(self, logits: Logits) -> Tensor:
        """The margin of every verdict that the draws are enough for, ``(verdicts, batch)``."""
        if self.target is None:
            return margins(self.rule, logits, self.y)
        return -margins(self.rule, logits, self.target)


def remaining_margin(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    rule: Rule,
    target: Labels | None = None,
    num_samples: int = SELECTION_DRAWS,
) -> Tensor:
    """How far the rule still is from the error wanted, by fresh draws: ``(batch,)``, see `Goal`."""
    with torch.no_grad():
        logits = logits_fn(x, num_samples if logits_fn.stochastic else None)
    return Goal(y, target, rule=rule).remaining(logits)


def check_active_set(active_set: bool, logits_fn: LogitsFn) -> None:
    """Refuses to let examples leave on the word of one random answer.

    Raises:
        ValueError: an active set on a random function.
    """
    if active_set and logits_fn.stochastic:
        raise ValueError("active_set=True needs a function without randomness; freeze the defense first")


class Best:
    """The best point seen so far of every example, by the smallest remaining margin."""

    def __init__(self, x: Inputs):
        self.x = x.clone()
        self.margin = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)

    def offer(self, points: Inputs, margin: Tensor, rows: Tensor | None = None) -> None:
        """Keeps the offered points (of some rows) where their margin is smaller."""
        rows = torch.arange(len(self.x), device=self.x.device) if rows is None else rows
        better = margin < self.margin[rows]
        self.x[rows[better]], self.margin[rows[better]] = points[better], margin[better]


class Closest:
    """The wrong point nearest to every example so far; the example itself until there is one."""

    def __init__(self, x: Inputs, norm: Norm):
        self.start, self.norm, self.x = x, norm, x.clone()
        self.distance = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        self.rows = torch.arange(len(x), device=x.device)

    def offer(self, points: Inputs, wrong: Tensor, rows: Tensor | None = None) -> None:
        """Keeps the offered points (of some rows) where they are wrong and nearer."""
        rows = self.rows if rows is None else rows
        distance = lp_norm(points - self.start[rows], self.norm)
        better = wrong & (distance < self.distance[rows])
        self.x[rows[better]], self.distance[rows[better]] = points[better], distance[better]
