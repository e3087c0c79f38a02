r"""What an attacker climbs: logits ``(samples, batch, classes)`` and labels to one loss per example.

Expectation over transformation is the sample axis: a loss says how it is averaged. All are in log
space and unchanged by a constant added to the logits. Larger means closer to an error.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from probdefense.logits.rules import mean_prob, score_margin
from probdefense.ops import is_class, log_mean_exp, log_sum_exp
from probdefense.types import Labels, Logits
from probdefense.validation import check_classes, check_label_form, check_labels, check_logits


def loss(body: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of logits and labels that refuses what does not fit; numbers are looked at when it fails."""

    @functools.wraps(body)
    def checked(logits: Logits, y: Labels, *target: Labels) -> Tensor:
        check_logits(logits)
        labels = dict(zip(("y", "target"), (y, *target), strict=False))
        for name, given in labels.items():
            check_label_form(given, logits.shape[1], name)
        try:
            return body(logits, *labels.values())
        except (IndexError, RuntimeError):
            for name, given in labels.items():
                check_labels(given, logits.shape[1], name)
                check_classes(given, logits.shape[2], name)
            raise

    return checked


@loss
def expected_cross_entropy(logits: Logits, y: Labels) -> Tensor:
    r"""Cross-entropy averaged over draws, $-\frac1S \sum_s \log \mathrm{softmax}(z_s)_y$.

    This is the usual expectation over transformation; by Jensen it is at least
    `predictive_cross_entropy`.

    Args:
        logits: ``(samples, batch, classes)``.
        y: True classes, ``(batch,)``.

    Returns:
        Nats per example, ``(batch,)``.

    References:
        Athalye et al., 2018, [Synthesizing Robust Adversarial Examples](https://arxiv.org/abs/1707.07397)

    Examples:
        >>> expected_cross_entropy(torch.zeros(2, 1, 2), torch.tensor([1]))
        tensor([0.6931])
    """
    return -_at(logits.log_softmax(-1), y).mean(0)


@loss
def predictive_cross_entropy(logits: Logits, y: Labels) -> Tensor:
    r"""Cross-entropy of the mean probability, $-\log \frac1S \sum_s \mathrm{softmax}(z_s)_y$.

    It matches the rule `mean_prob`. Computed as a log-sum-exp, so it stays finite where averaged
    probabilities underflow.

    Args:
        logits: ``(samples, batch, classes)``.
        y: True classes, ``(batch,)``.

    Returns:
        Nats per example, ``(batch,)``.

    References:
        Salman et al., 2019, [Provably Robust Deep Learning via Adversarially Trained Smoothed
        Classifiers](https://arxiv.org/abs/1906.04584)

    Examples:
        >>> predictive_cross_entropy(torch.tensor([[[0.0, 400.0]], [[0.0, 200.0]]]), torch.tensor([0]))
        tensor([200.6931])
    """
    return -log_mean_exp(_at(logits.log_softmax(-1), y))


@loss
def margin(logits: Logits, y: Labels) -> Tensor:
    r"""Logit margin averaged over draws, $\frac1S \sum_s (\max_{j \ne y} z_{s,j} - z_{s,y})$.

    Args:
        logits: ``(samples, batch, classes)``.
        y: True classes, ``(batch,)``.

    Returns:
        ``(batch,)``, in logits.

    References:
        Carlini and Wagner, 2017, [Towards Evaluating the Robustness of Neural
        Networks](https://arxiv.org/abs/1608.04644)

    Examples:
        >>> margin(torch.tensor([[[3.0, 1.0, 0.0]]]), torch.tensor([0]))
        tensor([-2.])
    """
    return _mean(-score_margin(logits, y))


@loss
def predictive_margin(logits: Logits, y: Labels) -> Tensor:
    r"""Margin of the mean probability, $\max_{j \ne y} \log \bar p_j - \log \bar p_y$.

    Positive exactly where the rule `mean_prob` errs.

    Args:
        logits: ``(samples, batch, classes)``.
        y: True classes, ``(batch,)``.

    Returns:
        ``(batch,)``, in nats.

    References:
        Carlini and Wagner, 2017, [Towards Evaluating the Robustness of Neural
        Networks](https://arxiv.org/abs/1608.04644)

    Examples:
        >>> predictive_margin(torch.tensor([[[3.0, 1.0, 0.0]]]), torch.tensor([0]))
        tensor([-2.])
    """
    return -score_margin(mean_prob(logits), y)


@loss
def probability_margin(logits: Logits, y: Labels) -> Tensor:
    r"""Margin of the mean probability itself, $\max_{j \ne y} \bar p_j - \bar p_y$.

    Positive exactly where the rule `mean_prob` errs. Probabilities bound what one class or one draw can
    weigh, which the logits do not; where a network is sure beyond rounding the margin is flat.

    Args:
        logits: ``(samples, batch, classes)``.
        y: True classes, ``(batch,)``.

    Returns:
        ``(batch,)``, in [-1, 1].

    References:
        Xie et al., 2024, [Towards Million-Scale Adversarial Robustness Evaluation With Stronger
        Individual Attacks](https://arxiv.org/abs/2411.15210)

    Examples:
        >>> probability_margin(torch.tensor([[[0.0, 200.0]], [[0.0, 0.0]]]), torch.tensor([0]))
        tensor([0.5000])
    """
    return -score_margin(logits.softmax(-1).mean(0), y)


@loss
def predictive_log_odds(logits: Logits, y: Labels) -> Tensor:
    r"""Odds against the label by the mean probability, $\log (1 - \bar p_y) - \log \bar p_y$.

    Its gradient has the direction of that of `predictive_cross_entropy` and never dies out: where a
    network is so sure that $\bar p_y$ rounds to 1, the cross-entropy is flat and the odds are not.

    Args:
        logits: ``(samples, batch, classes)``.
        y: True classes, ``(batch,)``.

    Returns:
        ``(batch,)``, in nats; positive where the label has less than half of the probability.

    Examples:
        >>> predictive_log_odds(torch.tensor([[[90.0, 0.0]]]), torch.tensor([0]))
        tensor([-90.])
    """
    log_probs = mean_prob(logits)
    truth = is_class(y, logits.shape[-1])
    return log_sum_exp(log_probs.masked_fill(truth, -torch.inf), -1) - _at(log_probs, y)


@loss
def dlr(logits: Logits, y: Labels) -> Tensor:
    r"""Difference of logits ratio, averaged over draws.

    $$ -\frac{z_y - \max_{j \ne y} z_j}{z_{\pi_1} - z_{\pi_3}} $$

    Unchanged by shifting or scaling the logits. With two classes there is no third and the ratio would be
    constant; there it is the `margin`.

    Args:
        logits: ``(samples, batch, classes)``.
        y: True classes, ``(batch,)``.

    Returns:
        ``(batch,)``, without unit.

    References:
        Croce and Hein, 2020, [Reliable evaluation of adversarial robustness with an ensemble of
        diverse parameter-free attacks](https://arxiv.org/abs/2003.01690)

    Examples:
        >>> dlr(torch.tensor([[[3.0, 1.0, -1.0]]]), torch.tensor([0]))
        tensor([-0.5000])
    """
    if logits.shape[-1] < 3:
        return margin(logits, y)
    ranked = logits.topk(3, dim=-1).values
    return _mean(-score_margin(logits, y) / _divisor(ranked[..., 0] - ranked[..., 2]))


@loss
def targeted_dlr(logits: Logits, y: Labels, target: Labels) -> Tensor:
    r"""The form of `dlr` that aims for a class, averaged over draws.

    $$ \frac{z_t - z_y}{z_{\pi_1} - \frac12 (z_{\pi_3} + z_{\pi_4})} $$

    Attacks with a ``target`` climb it when their loss is `dlr`. With three classes the third stands in
    for the fourth, with two it is the `margin`.

    Args:
        logits: ``(samples, batch, classes)``.
        y: True classes, ``(batch,)``.
        target: Classes wanted, ``(batch,)``.

    Returns:
        ``(batch,)``, without unit.

    References:
        Croce and Hein, 2020, [Reliable evaluation of adversarial robustness with an ensemble of
        diverse parameter-free attacks](https://arxiv.org/abs/2003.01690)

    Examples:
        >>> targeted_dlr(torch.tensor([[[3.0, 1.0, 0.0, -2.0]]]), torch.tensor([0]), torch.tensor([1]))
        tensor([-0.5000])
    """
    if logits.shape[-1] < 3:
        return margin(logits, y)
    ranked = logits.topk(min(4, logits.shape[-1]), dim=-1).values
    last = torch.where(ranked[..., -1].isneginf(), ranked[..., 2], ranked[..., -1])
    wanted = _at(logits, target)
    lead = torch.where(wanted.isneginf(), -torch.inf, wanted - _at(logits, y))
    return _mean(lead / _divisor(ranked[..., 0] - (ranked[..., 2] + last) / 2))


dlr.toward = targeted_dlr  # type: ignore[attr-defined]


@loss
def vote_margin(logits: Logits, y: Labels) -> Tensor:
    r"""Smooth surrogate of the vote, $\frac1S \sum_s \tanh(\frac12 (\max_{j \ne y} z_{s,j} - z_{s,y}))$.

    Every draw counts at most one vote, so the climb goes where votes can still change. It matches
    the rules `vote` and `single_draw`. It counts in nats: where margins are hundreds of them, it is flat.

    Args:
        logits: ``(samples, batch, classes)``.
        y: True classes, ``(batch,)``.

    Returns:
        ``(batch,)``, in (-1, 1).

    References:
        Dbouk and Shanbhag, 2022, [Adversarial Vulnerability of Randomized
        Ensembles](https://arxiv.org/abs/2206.06737), for why averaged margins fail for votes.

    Examples:
        >>> vote_margin(torch.tensor([[[0.0, 100.0]], [[100.0, 0.0]]]), torch.tensor([0]))
        tensor([0.])
    """
    return torch.tanh(-score_margin(logits, y) / 2).mean(0)


def _divisor(gap: Tensor) -> Tensor:
    """A gap to divide by; 1 where there is none, or where no third class is in play."""
    return torch.where((gap > 0) & gap.isfinite(), gap, 1.0)


def _mean(rows: Tensor) -> Tensor:
    """The mean over draws; draws that are infinite to both sides cancel."""
    opposed = rows.isposinf().any(0) & rows.isneginf().any(0)
    return torch.where(opposed, 0.0, rows.mean(0))


def _at(scores: Tensor, y: Labels) -> Tensor:
    """The column of the label, ``(samples, batch, classes) -> (samples, batch)``."""
    index = y.expand(scores.shape[:-1]).unsqueeze(-1)
    return scores.gather(-1, index).squeeze(-1)
