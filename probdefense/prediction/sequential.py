r"""Sequential ensembling: draw until the decision is settled.

The predictive's label is $c^* = \arg\max_k \mathbb{E}\, p_k$. For every class $k$ stands a wager against
"$k$ is the label", on the draws' own probabilities: after draw $t$ its capital is multiplied by
$1 + \lambda_t (p_{L_t} - p_k)$, with the leader $L_t$ and the stake $\lambda_t$ taken from earlier draws.
If $k$ is the label, no wager gains on average, so by Ville's inequality the capital against it ever
reaches $1/\alpha$ with probability at most $\alpha$: the classes below form a confidence sequence, and one
bet per class needs no correction for their number or for looking after every draw.
"""

import math

import torch
from torch import Tensor

from probdefense.ops import entropy
from probdefense.types import Inputs, LogitsFn
from probdefense.validation import check_answer

CAUTION = 0.1
"""Added to the sum of squares in the stake, which approximates the share that grows capital fastest."""

LARGEST_STAKE = 0.95
"""A bet of everything would be lost for good at the first draw that is sure of something else."""


def settle(logits_fn: LogitsFn, x: Inputs, alpha: float, num_samples: int) -> "Race":
    """Draws for every example until its label is settled, or `num_samples` times.

    The draws come one by one: those of one call need not be independent (an ensemble goes through its
    members in turns), and an example that is settled asks for no more.
    """
    race = Race(_one(logits_fn, x), alpha)
    while len(race.running) and race.drawn < num_samples:
        race.see(_one(logits_fn, x[race.running]))
    return race


def _one(logits_fn: LogitsFn, x: Inputs) -> Tensor:
    """One draw, ``(batch, classes)``."""
    return check_answer(logits_fn(x, 1), len(x), "the draws of a prediction")[0]


class Race:
    """Wagers against every class of every example; those that are settled leave.

    Args:
        logits: The first draw, ``(batch, classes)``, on which nothing is bet.
        alpha: The chance of a wrong settled label.

    Attributes:
        running: Examples that are not settled, in the order of the rows that `see` expects.
        label: The class that is left, or -1, ``(batch,)``.
        drawn: Draws so far.
        num_samples: Draws seen, ``(batch,)``.
        log_total: Log of the sum of the probabilities, ``(batch, classes)``.
        entropy: Sum of the entropies of the draws, nats, ``(batch,)``.
    """

    def __init__(self, logits: Tensor, alpha: float):
        log_probs = logits.log_softmax(-1)
        self.goal, self.drawn = -math.log(alpha), 1
        self.running = torch.arange(len(logits), device=logits.device)
        self.label = torch.full_like(self.running, -1)
        self.num_samples = torch.ones_like(self.running)
        self.log_total, self.entropy = log_probs.clone(), entropy(log_probs)
        self.history = log_probs.exp().unsqueeze(0)
        self.capital = torch.zeros_like(logits)
        self.possible = torch.ones_like(logits, dtype=torch.bool)

    def see(self, logits: Tensor) -> None:
        """Settles the bets of one more draw of the running examples, ``(running, classes)``."""
        log_probs = logits.log_softmax(-1)
        probs, rows = log_probs.exp(), self.running
        self.drawn += 1
        self.num_samples[rows] = self.drawn
        self.log_total[rows] = torch.logaddexp(self.log_total[rows], log_probs)
        self.entropy[rows] += entropy(log_probs)
        leader = self.history.sum(0).argmax(-1, keepdim=True)
        past = self.history.gather(-1, leader.expand(len(self.history), -1, -1)) - self.history
        stake = (past.sum(0) / (past.square().sum(0) + CAUTION)).clamp(0.0, LARGEST_STAKE)
        self.capital += torch.log1p(stake * (probs.gather(-1, leader) - probs))
        self.possible &= self.capital < self.goal
        self.history = torch.cat([self.history, probs.unsqueeze(0)])
        left = self.possible.sum(-1) == 1
        if bool(left.any()):
            self.label[rows[left]] = self.possible[left].float().argmax(-1)
            self.history, self.running = self.history[:, ~left], rows[~left]
            self.capital, self.possible = self.capital[~left], self.possible[~left]
