"""What an attacker wants, and which of several points comes nearest to it."""

from typing import NamedTuple

import torch
from torch import Tensor

from probdefense.attacks.tools.gradient import ask, climb
from probdefense.logits.losses import expected_cross_entropy
from probdefense.logits.rules import margins, mean_prob, scale_free, spread
from probdefense.ops import lp_norm, per_example
from probdefense.types import Inputs, Labels, Logits, LogitsFn, LossFn, Norm, Rule

SELECTION_DRAWS = 32
"""Fresh draws on which points are compared: not those that were climbed, nor those of a verdict."""


STANDARD = 20.0
"""The spread that logits are brought to, in nats: about that of a usual network."""

QUANTILE = 2.3263
"""Of the standard normal at 99 %."""

ENDLESS = 1e30
"""The margin over classes that are all ruled out: so long that nothing reaches it, and still a number."""

GROUPS = 8
"""Groups of draws that the jackknife leaves out in turn."""


class Goal(NamedTuple):
    """What is wanted of every example, any class but `y` or the class `target`, and how it is climbed.

    With `sure`, the given draws stand for others: wrong means that 99 % of verdicts are wrong. `unit`, the
    spread of the logits at the example, makes margins and losses independent of the scale of the logits:
    they come in nats of a network of spread `STANDARD`.
    """

    y: Labels
    target: Labels | None = None
    loss: LossFn = expected_cross_entropy
    rule: Rule = mean_prob
    sure: bool = False
    unit: Tensor | None = None

    def measured(self, logits: Logits) -> "Goal":
        """The goal in units of the spread of these logits, the answer about the examples themselves."""
        unit = spread(logits.detach()).mean(0)
        return self._replace(unit=torch.where(unit > 0, unit, 1.0))

    def take(self, rows: slice | Tensor) -> "Goal":
        """The goal for some of the examples."""
        target, unit = (None if part is None else part[rows] for part in (self.target, self.unit))
        return self._replace(y=self.y[rows], target=target, unit=unit)

    def climbed(self, logits: Logits) -> Tensor:
        """What is climbed, ``(samples, batch, classes) -> (batch,)``."""
        logits, factor = self.standard(logits)
        values = climb(self.loss, self.y, self.target)(logits)
        return values if self.unit is None else values * factor

    def nats(self, confidence: float) -> Tensor | float:
        """Nats of the network as what is climbed counts them, ``(batch,)``."""
        return confidence if self.unit is None else confidence * STANDARD / self.unit

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
        logits, factor = self.standard(logits)
        if self.target is None:
            found = margins(self.rule, logits, self.y)
        else:
            found = -margins(self.rule, logits, self.target)
        return (found * factor).clamp(-ENDLESS, ENDLESS)

    def standard(self, logits: Logits) -> tuple[Logits, Tensor | float]:
        """The logits to judge and the factor on what comes out, so that it is in standard nats.

        Where the rule asks which logit is larger, and not by how much, the logits themselves are brought to
        the standard spread, and any loss then climbs as on a usual network.
        """
        if self.unit is None:
            return logits, 1.0
        factor = STANDARD / self.unit
        if scale_free(self.rule, len(logits)):
            return logits * factor.unsqueeze(-1), 1.0
        return logits, factor


def remaining_margin(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    rule: Rule,
    target: Labels | None = None,
    num_samples: int = SELECTION_DRAWS,
) -> Tensor:
    """How far the rule still is from the error wanted, by fresh draws: ``(batch,)``, see `Goal`."""
    logits = ask(logits_fn, x, num_samples if logits_fn.stochastic else None)
    return Goal(y, target, rule=rule).remaining(logits)


def check_active_set(active_set: bool, logits_fn: LogitsFn) -> None:
    """Refuses to let examples leave on the word of one random answer.

    Raises:
        ValueError: an active set on a random function.
    """
    if active_set and logits_fn.stochastic:
        raise ValueError(
            "expected a function without randomness with active_set=True, got a random one; freeze the "
            "defense first"
        )


class Best:
    """The best point seen so far of every example, by the smallest remaining margin."""

    def __init__(self, x: Inputs):
        self.x = x.clone()
        self.margin = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)

    def offer(self, points: Inputs, margin: Tensor, rows: Tensor | None = None) -> None:
        """Keeps the offered points (of some rows) where their margin is smaller."""
        rows = torch.arange(len(self.x), device=self.x.device) if rows is None else rows
        margin = margin.to(self.margin.dtype)
        better = margin < self.margin[rows]
        self.x[rows] = torch.where(per_example(better, points), points, self.x[rows])
        self.margin[rows] = torch.where(better, margin, self.margin[rows])


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
        self.x[rows] = torch.where(per_example(better, points), points, self.x[rows])
        self.distance[rows] = torch.where(better, distance, self.distance[rows])
