"""From points to verdicts: fresh draws, the same for clean inputs and every attack; nothing is filed here."""

from typing import NamedTuple

import torch
from torch import Tensor

from probdefense.logits.rules import margins, mean_prob, verdicts
from probdefense.ops import entropy
from probdefense.prediction.drawing import draw_groups
from probdefense.rng import derive, forked
from probdefense.types import Inputs, Labels, LogitsFn, Rule
from probdefense.validation import check_classes

SELECTION_SAMPLES = 32
"""Draws on which the worst of several attacks is chosen."""


class Seen(NamedTuple):
    """What the verdict draws say of a set of points.

    ``correct`` (verdicts, batch) by rule; ``log_probs`` (batch, classes) of the mean probability;
    ``expected_entropy`` (batch,) in nats; ``num_samples`` draws in all; ``margins`` (batch,) by rule, on the
    draws by which the worst of several attacks is chosen, where they are wanted.
    """

    correct: dict[str, Tensor]
    log_probs: Tensor
    expected_entropy: Tensor
    num_samples: int
    margins: dict[str, Tensor]

    def where(self, mask: Tensor, other: "Seen") -> "Seen":
        """What is seen of some examples here, of the rest there."""
        return Seen(
            {rule: torch.where(mask, here, other.correct[rule]) for rule, here in self.correct.items()},
            torch.where(mask.unsqueeze(1), self.log_probs, other.log_probs),
            torch.where(mask, self.expected_entropy, other.expected_entropy),
            self.num_samples,
            {rule: torch.where(mask, here, other.margins[rule]) for rule, here in self.margins.items()},
        )


class Judge(NamedTuple):
    """Gives verdicts on points of some examples, all by the same draws, which stay in `kept`."""

    logits_fn: LogitsFn
    rules: tuple[Rule, ...]
    num_samples: int
    seed: int
    selects: bool
    kept: dict[int, LogitsFn] | None = None

    def see(self, points: Inputs, y: Labels, first: int) -> Seen:
        """The verdicts of every rule; `first` is the number of the first example.

        Seeded throughout, so that even a network that draws for itself answers by the seed alone.
        """
        with forked(derive(self.seed, "judge", first), points.device):
            return self._see(points, y, first)

    def _see(self, points: Inputs, y: Labels, first: int) -> Seen:
        verdict, selection = derive(self.seed, "verdict"), derive(self.seed, "selection")
        groups = draw_groups(self.logits_fn, points, self.num_samples, verdict, first, self.kept)
        check_classes(y, groups[0].shape[-1])
        correct = {
            rule_name(rule): torch.cat([verdicts(rule, group, y) for group in groups]) for rule in self.rules
        }
        logits, left = torch.cat(groups), {}
        if self.selects:
            drawn = draw_groups(self.logits_fn, points, SELECTION_SAMPLES, selection, first, self.kept)
            for rule in self.rules:
                left[rule_name(rule)] = torch.cat([margins(rule, group, y) for group in drawn]).mean(0)
        expected = entropy(logits.log_softmax(-1)).mean(0)
        return Seen(correct, mean_prob(logits), expected, len(logits), left)


def rule_name(rule: Rule) -> str:
    """The name under which a rule appears in a report."""
    return getattr(rule, "__name__", type(rule).__name__)
