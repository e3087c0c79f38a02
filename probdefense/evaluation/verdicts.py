"""From points to verdicts: fresh draws, the same for clean inputs and every attack; nothing is filed here."""

from typing import NamedTuple

import torch
from torch import Tensor

from probdefense.logits.rules import margins, mean_prob, verdicts
from probdefense.ops import entropy
from probdefense.prediction.drawing import draw_groups
from probdefense.rng import derive
from probdefense.types import Inputs, Labels, LogitsFn, Rule
from probdefense.validation import check_classes

SELECTION_SAMPLES = 32
"""Draws on which the worst of several attacks is chosen."""


class Seen(NamedTuple):
    """What the verdict draws say of a set of points.

    ``correct`` (verdicts, batch) by rule; ``log_probs`` (batch, classes) of the mean probability;
    ``expected_entropy`` (batch,) in nats; ``num_samples`` draws in all.
    """

    correct: dict[str, Tensor]
    log_probs: Tensor
    expected_entropy: Tensor
    num_samples: int

    def where(self, mask: Tensor, other: "Seen") -> "Seen":
        """What is seen of some examples here, of the rest there."""
        correct = {rule: torch.where(mask, here, other.correct[rule]) for rule, here in self.correct.items()}
        log_probs = torch.where(mask.unsqueeze(1), self.log_probs, other.log_probs)
        expected = torch.where(mask, self.expected_entropy, other.expected_entropy)
        return Seen(correct, log_probs, expected, self.num_samples)


class Judge(NamedTuple):
    """Gives verdicts on points of the same examples, all by the same draws."""

    logits_fn: LogitsFn
    y: Labels
    rules: tuple[Rule, ...]
    num_samples: int
    seed: int

    def see(self, points: Inputs) -> Seen:
        """The verdicts of every rule."""
        groups = draw_groups(self.logits_fn, points, self.num_samples, derive(self.seed, "verdict"))
        check_classes(self.y, groups[0].shape[-1])
        correct = {
            rule_name(rule): torch.cat([verdicts(rule, group, self.y) for group in groups])
            for rule in self.rules
        }
        logits = torch.cat(groups)
        return Seen(correct, mean_prob(logits), entropy(logits.log_softmax(-1)).mean(0), len(logits))

    def worst(self, candidates: list[Inputs]) -> dict[str, Tensor]:
        """Which candidate leaves every example the smallest margin, ``(batch,)`` by rule, on other draws."""
        seed = derive(self.seed, "selection")
        drawn = [draw_groups(self.logits_fn, points, SELECTION_SAMPLES, seed) for points in candidates]
        return {
            rule_name(rule): torch.stack(
                [torch.cat([margins(rule, group, self.y) for group in groups]).mean(0) for groups in drawn]
            ).argmin(0)
            for rule in self.rules
        }


def rule_name(rule: Rule) -> str:
    """The name under which a rule appears in a report."""
    return getattr(rule, "__name__", type(rule).__name__)
