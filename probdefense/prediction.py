r"""The posterior predictive and its uncertainty, in log space.

$$ p(y|x) = \frac1S \sum_s \mathrm{softmax}(z_s), \qquad
   \underbrace{H[p]}_{\text{total}} = \underbrace{\tfrac1S \sum_s H[p_s]}_{\text{expected}} +
   \underbrace{I(y; \theta)}_{\text{mutual information}} $$
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from probdefense.adapters import as_logits_fn, can_freeze
from probdefense.rng import forked
from probdefense.rules import mean_prob
from probdefense.types import Inputs, Logits, LogitsFn
from probdefense.validation import check_count, check_inputs, check_logits


@dataclass(frozen=True)
class Prediction:
    """The posterior predictive of a batch.

    Attributes:
        log_probs: Log of the mean probability, ``(batch, classes)``.
        expected_entropy: Mean entropy of the draws, nats, ``(batch,)``.
        num_samples: Draws behind it.
    """

    log_probs: Tensor
    expected_entropy: Tensor
    num_samples: int

    @property
    def probs(self) -> Tensor:
        """Mean probabilities, ``(batch, classes)``."""
        return self.log_probs.exp()

    @property
    def label(self) -> Tensor:
        """The most probable class, ``(batch,)``."""
        return self.log_probs.argmax(-1)

    @property
    def predictive_entropy(self) -> Tensor:
        """Entropy of the mean probability (total uncertainty), nats, ``(batch,)``."""
        return entropy(self.log_probs)

    @property
    def mutual_information(self) -> Tensor:
        """What the draws disagree about (epistemic uncertainty), nats, ``(batch,)``, at least 0."""
        return (self.predictive_entropy - self.expected_entropy).clamp_min(0.0)


def entropy(log_probs: Tensor) -> Tensor:
    r"""Entropy $-\sum_k p_k \log p_k$ in nats, ``(..., classes) -> (...)``; zero probabilities count 0.

    Example:
        >>> entropy(torch.tensor([0.5, 0.5, 0.0]).log())
        tensor(0.6931)
    """
    return -torch.where(log_probs.isneginf(), 0.0, log_probs.exp() * log_probs).sum(-1)


def predict(logits_fn: LogitsFn, x: Inputs, num_samples: int = 50, *, seed: int | None = None) -> Prediction:
    """Averages the probabilities of draws: the prediction of an ensemble.

    The draws are common to the batch (weights and noise are drawn once per sample), which costs
    little more than the forward passes and leaves every example's own prediction as it would be.

    Args:
        logits_fn: A `Defense` or any `LogitsFn`.
        x: ``(batch, *event)`` in [0, 1].
        num_samples: Draws; a function without randomness gives the one that it has.
        seed: Of the draws; torch's global state by default.

    Returns:
        A `Prediction`.

    Raises:
        ValueError: bad inputs or `num_samples` below 1.

    References:
        Liu et al., 2018, [Towards Robust Neural Networks via Random Self-ensemble](https://arxiv.org/abs/1712.00673)

    Example:
        >>> import probdefense as pd
        >>> predict(pd.defenses.rse(pd.models.small_cnn()), torch.rand(3, 1, 8, 8)).probs.shape
        torch.Size([3, 10])
    """
    check_count("num_samples", num_samples)
    check_inputs(x)
    logits_fn = as_logits_fn(logits_fn)
    with torch.no_grad(), forked(seed, x.device):
        logits = draw_logits(logits_fn, x, num_samples)
    return Prediction(mean_prob(logits), entropy(logits.log_softmax(-1)).mean(0), len(logits))


def draw_logits(logits_fn: LogitsFn, x: Inputs, num_samples: int) -> Logits:
    """Logits of draws common to the batch where the function can freeze, of fresh ones elsewhere."""
    source = logits_fn.freeze(num_samples) if logits_fn.stochastic and can_freeze(logits_fn) else logits_fn
    logits = source(x, num_samples)
    check_logits(logits, len(x))
    return logits
