r"""Do the probabilities mean what they say? Scores of predicted probabilities, clean and attacked.

Guo et al., 2017, [On Calibration of Modern Neural Networks](https://arxiv.org/abs/1706.04599). With
confidence $c_i = \max_k p_{ik}$, bins $B_m$ of it and $n$ examples,

$$ \mathrm{ECE} = \sum_m \frac{|B_m|}{n} \left| \mathrm{acc}(B_m) - \mathrm{conf}(B_m) \right|, \qquad
   \mathrm{Brier} = \frac1n \sum_{i,k} (p_{ik} - 1[y_i = k])^2 $$
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from probdefense.types import Labels
from probdefense.validation import check_count, check_log_probs


class Reliability(NamedTuple):
    """A reliability diagram: per bin of confidence, mean confidence, accuracy and size, ``(bins,)``."""

    confidence: Tensor
    accuracy: Tensor
    size: Tensor


class Calibration(NamedTuple):
    """How good probabilities are: ``nll`` in nats and ``brier`` (proper scores), ``ece``, ``accuracy``."""

    nll: float
    brier: float
    ece: float
    accuracy: float


def reliability(log_probs: Tensor, y: Labels, *, num_bins: int = 15) -> Reliability:
    """Confidence against accuracy in bins of equal width; empty bins have zeros.

    Args:
        log_probs: ``(batch, classes)``, as `Prediction.log_probs`.
        y: True classes, ``(batch,)``.
        num_bins: Bins of [0, 1].

    Returns:
        A `Reliability`.

    Raises:
        ValueError: labels or shapes that do not fit.

    References:
        Guo et al., 2017, [On Calibration of Modern Neural Networks](https://arxiv.org/abs/1706.04599)

    Examples:
        >>> diagram = reliability(torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log(), torch.tensor([0, 1]))
        >>> diagram.accuracy[13], diagram.confidence[13], diagram.size[13]
        (tensor(0.5000), tensor(0.9000), tensor(2.))
    """
    check_log_probs(log_probs, y)
    num_bins = check_count("num_bins", num_bins)
    confidence, label = log_probs.exp().max(-1)
    # A bin is open below and closed above, so that certainty falls into the last one.
    index = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    sums = torch.zeros(3, num_bins, dtype=confidence.dtype, device=confidence.device)
    values = torch.stack([confidence, (label == y).to(confidence.dtype), torch.ones_like(confidence)])
    sums.index_add_(1, index, values)
    return Reliability(sums[0] / sums[2].clamp_min(1), sums[1] / sums[2].clamp_min(1), sums[2])


def calibration(log_probs: Tensor, y: Labels, *, num_bins: int = 15) -> Calibration:
    """Negative log-likelihood, Brier score, expected calibration error and accuracy.

    The calibration error is not a proper score: a classifier that ignores its input can have none. It
    is biased upward where bins are thin.

    Args:
        log_probs: ``(batch, classes)``, as `Prediction.log_probs`.
        y: True classes, ``(batch,)``.
        num_bins: Bins of confidence.

    Returns:
        A `Calibration`.

    Raises:
        ValueError: labels or shapes that do not fit.

    References:
        Brier, 1950, [Verification of Forecasts Expressed in Terms of
        Probability](https://doi.org/10.1175/1520-0493(1950)078%3C0001:VOFEIT%3E2.0.CO;2); Guo et al.,
        2017, [On Calibration of Modern Neural Networks](https://arxiv.org/abs/1706.04599)

    Examples:
        >>> found = calibration(torch.tensor([[0.75, 0.25]] * 4).log(), torch.tensor([0, 0, 0, 1]))
        >>> round(found.nll, 4), found.brier, found.ece, found.accuracy
        (0.5623, 0.375, 0.0, 0.75)
    """
    bins = reliability(log_probs, y, num_bins=num_bins)
    truth = one_hot(y, log_probs.shape[-1])
    gap = (bins.accuracy - bins.confidence).abs() * bins.size
    return Calibration(
        nll=float(-log_probs.gather(1, y.unsqueeze(1)).mean()),
        brier=float((log_probs.exp() - truth).square().sum(-1).mean()),
        ece=float(gap.sum() / len(y)),
        accuracy=float((log_probs.argmax(-1) == y).double().mean()),
    )
