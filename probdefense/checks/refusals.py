"""What a defense answers instead of logits: NaN where it refuses, one constant, or a class of its own.

Attacks and verdicts refuse NaN, so a defense that answers NaN where it suspects an attack would only look
broken. Here it is put in front of the checks with such answers replaced by zeros, which no attack can climb,
and counted. Constants and extra classes are legitimate numbers; they show in the verdicts under attack.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from probdefense.logits.adapters import Counted
from probdefense.logits.rules import mean_prob
from probdefense.ops import per_example
from probdefense.types import Inputs, Labels, Logits, LogitsFn
from probdefense.validation import check_logits

EXAMPLES_PER_CLASS = 5
"""So many labels per class must be there before a class without one is called an extra class."""


@dataclass
class Tally:
    """What was answered so far.

    Attributes:
        asked: Answers, example x draw.
        refused: Those that were NaN or infinite.
        broken: Examples whose gradient was.
        constant: Share of the inputs that got one and the same answer, by set of points.
        chosen: Share of every class among the decisions, by set of points.
    """

    asked: int = 0
    refused: int = 0
    broken: int = 0
    constant: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)

    def note(self, points: Inputs, logits: Logits) -> None:
        """Looks at the verdict draws of a set of points; of those that are equal, at the first."""
        where = points.flatten(1).unique(dim=0, return_inverse=True)[1].tolist()
        different = [where.index(place) for place in dict.fromkeys(where)]
        _, which, counts = logits[0, different].unique(dim=0, return_inverse=True, return_counts=True)
        constant = torch.zeros(len(points), dtype=torch.bool)
        constant[different] = ((counts[which] == counts.max()) & (counts[which] > 1)).cpu()
        self.constant.append(constant)
        self.chosen.append(mean_prob(logits).argmax(-1))

    def share_constant(self) -> tuple[Tensor, Tensor]:
        """Which inputs got the commonest answer: clean, and under the attack that met it most often."""
        under = max(self.constant[1:], key=lambda share: float(share.double().mean()))
        return self.constant[0].double(), under.double()

    def extra_class(self, y: Labels, num_classes: int) -> tuple[int, Tensor] | None:
        """The one class without a label that no clean input gets, and which attacked inputs get it."""
        if len(y) < EXAMPLES_PER_CLASS * num_classes:
            return None
        known = torch.cat([y, self.chosen[0]]).unique()
        absent = [k for k in range(num_classes) if k not in known.tolist()]
        if len(absent) != 1:
            return None
        under = max((chosen == absent[0] for chosen in self.chosen[1:]), key=lambda rows: int(rows.sum()))
        return absent[0], under.double()


class Answering:
    """A function whose NaN answers are counted and replaced by zeros, with everything derived from it."""

    def __init__(self, logits_fn: LogitsFn, tally: Tally):
        self.logits_fn, self.tally = logits_fn, tally

    @property
    def stochastic(self) -> bool:
        """As the function itself."""
        return self.logits_fn.stochastic

    def __call__(self, x: Inputs, num_samples: int | None = None) -> Logits:
        """``(samples, batch, classes)``, finite."""
        point = x
        if x.requires_grad:
            point = x.clone()
            point.register_hook(self._finite)
        logits = self.logits_fn(point, num_samples)
        check_logits(logits, len(x))
        refused = ~logits.detach().amax(-1).isfinite()
        self.tally.asked += refused.numel()
        if not bool(refused.any()):
            return logits
        self.tally.refused += int(refused.sum())
        return logits.masked_fill(refused.unsqueeze(-1), 0.0)

    def _finite(self, slope: Tensor) -> Tensor:
        """A gradient without NaN: beside a refusal it may be one even where the answer is not."""
        broken = ~slope.isfinite().flatten(1).all(1)
        self.tally.broken += int(broken.sum())
        return slope.masked_fill(per_example(broken, slope), 0.0)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("logits_fn", "tally"):
            raise AttributeError(name)
        value = getattr(self.logits_fn, name)
        if name not in Counted.DERIVED or value is None:
            return value
        if not inspect.isroutine(value):
            return Answering(value, self.tally)
        return lambda *args, **kwargs: Answering(value(*args, **kwargs), self.tally)
