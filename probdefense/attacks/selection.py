"""Which of several points is the worst for the defense: judged on draws that nothing climbed."""

import torch
from torch import Tensor

from probdefense.rules import margins
from probdefense.types import Inputs, Labels, LogitsFn, Rule

SELECTION_DRAWS = 32
"""Fresh draws on which points are compared: not those that were climbed, nor those of a verdict."""


def remaining_margin(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    rule: Rule,
    target: Labels | None = None,
    num_samples: int = SELECTION_DRAWS,
) -> Tensor:
    """How far the rule still is from the error wanted, ``(batch,)``; zero or less has reached it."""
    with torch.no_grad():
        logits = logits_fn(x, num_samples if logits_fn.stochastic else None)
    if target is None:
        return margins(rule, logits, y).mean(0)
    return -margins(rule, logits, target).mean(0)


class Best:
    """The best point seen so far of every example, by the smallest remaining margin."""

    def __init__(self, x: Inputs):
        self.x = x.clone()
        self.margin = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)

    def offer(self, points: Inputs, margin: Tensor) -> None:
        """Keeps the offered points where their margin is smaller."""
        better = margin < self.margin
        self.x[better], self.margin[better] = points[better], margin[better]
