r"""Does uncertainty give attacks away? Scores that detect, abstention, and the attack that evades them.

A detector refuses inputs whose uncertainty $u(x)$ is high. Its quality against an attack that does not
know it says little (Carlini and Wagner, 2017, [Adversarial Examples Are Not Easily
Detected](https://arxiv.org/abs/1705.07263); Feng et al., 2024, [Attacking
Bayes](https://arxiv.org/abs/2404.19640)): `evading` turns a loss into one that also lowers the score,
$\ell(x) - w\, u(x)$, for any attack that takes ``loss=``.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from probdefense.evaluation.calibration import calibration
from probdefense.evaluation.intervals import wilson
from probdefense.evaluation.report import Report, Row, check_report
from probdefense.logits.losses import predictive_cross_entropy
from probdefense.logits.rules import mean_prob, of_draws
from probdefense.ops import entropy
from probdefense.types import Labels, Logits, LossFn
from probdefense.validation import (
    check_function,
    check_member,
    check_number,
    check_positive,
    check_share,
    check_vector,
)

Score = Callable[[Logits], Tensor]
"""``(samples, batch, classes) -> (batch,)``, larger is more uncertain."""


@of_draws
def predictive_entropy(logits: Logits) -> Tensor:
    """Entropy of the mean probability, total uncertainty, nats, ``(batch,)``.

    Args:
        logits: ``(samples, batch, classes)``.

    Examples:
        >>> predictive_entropy(torch.zeros(3, 1, 2))
        tensor([0.6931])
    """
    return entropy(mean_prob(logits))


@of_draws
def mutual_information(logits: Logits) -> Tensor:
    """What the draws disagree about, epistemic uncertainty, nats, ``(batch,)``.

    Args:
        logits: ``(samples, batch, classes)``.

    Examples:
        >>> mutual_information(torch.tensor([[[0.0, 200.0]], [[200.0, 0.0]]]))
        tensor([0.6931])
    """
    return predictive_entropy(logits) - entropy(logits.log_softmax(-1)).mean(0)


SCORES: dict[str, Score] = {
    "predictive_entropy": predictive_entropy,
    "mutual_information": mutual_information,
}


def evading(score: Score, *, loss: LossFn | None = predictive_cross_entropy, weight: float = 1.0) -> LossFn:
    r"""A loss that climbs toward an error and away from the detector, $\ell(x) - w\, u(x)$.

    Args:
        score: The detector's uncertainty, such as `mutual_information`.
        loss: What is climbed besides; None to lower the score alone, which makes an input from
            elsewhere look familiar.
        weight: $w$; try several, because the best one differs between defenses.

    Returns:
        A loss ``(logits, y) -> (batch,)`` for any attack.

    Raises:
        ValueError: `weight` not positive.

    References:
        Feng et al., 2024, [Attacking Bayes](https://arxiv.org/abs/2404.19640)

    Examples:
        >>> import probdefense as pd
        >>> attack = partial(pd.attacks.pgd, loss=evading(mutual_information), num_steps=2, eps=0.1)
        >>> defense = pd.defenses.bayesian(torch.nn.Linear(4, 3)).samples(4)
        >>> attack(defense, torch.rand(2, 4), torch.tensor([0, 1])).shape
        torch.Size([2, 4])
    """
    weight = check_positive("weight", weight)
    check_function("score", score, "logits")
    if loss is not None:
        check_function("loss", loss, "logits", "y")

    def evading_loss(logits: Logits, y: Labels) -> Tensor:
        lowered = -weight * score(logits)
        return lowered if loss is None else loss(logits, y) + lowered

    return evading_loss


class Auroc(NamedTuple):
    """Area under the detector's curve, with its 95 % interval; 0.5 is no better than chance."""

    value: float
    low: float
    high: float


def auroc(familiar: Tensor, strange: Tensor) -> Auroc:
    r"""Chance that a strange input scores higher than a familiar one, $P(u_s > u_f) + \frac12 P(u_s = u_f)$.

    Args:
        familiar: Scores of inputs to accept, ``(n,)``.
        strange: Scores of inputs to refuse, ``(m,)``.

    Returns:
        The area, with the interval of DeLong's variance on Wilson's scale.

    References:
        DeLong et al., 1988, [Comparing the Areas under Two or More Correlated Receiver Operating
        Characteristic Curves](https://doi.org/10.2307/2531595)

    Examples:
        >>> auroc(torch.tensor([0.1, 0.2]), torch.tensor([0.2, 0.3])).value
        0.875
    """
    from scipy.stats import rankdata

    check_vector(familiar, "familiar"), check_vector(strange, "strange")
    inside, outside = (np.asarray(part.detach().cpu(), dtype=float) for part in (familiar, strange))
    n, m = len(inside), len(outside)
    ranks = rankdata(np.concatenate([inside, outside]))
    of_outside = (ranks[n:] - rankdata(outside)) / n
    of_inside = 1 - (ranks[:n] - rankdata(inside)) / m
    value, least = float(of_outside.mean()), min(n, m)
    variance = sum(float(part.var(ddof=1)) / len(part) for part in (of_inside, of_outside) if len(part) > 1)
    trials = max(least, value * (1 - value) / variance) if variance > 0 else least
    return Auroc(value, *wilson(value * trials, trials))


class Selection(NamedTuple):
    """What abstention does on one set of inputs: shares of all of them.

    ``answered`` kept by the detector; ``accuracy`` of the answered ones (NaN if none); ``errors``
    answered and wrong, which is what an attacker wants.
    """

    answered: float
    accuracy: float
    errors: float


def threshold(familiar: Tensor, keep: float = 0.95) -> float:
    """The score that the share `keep` of familiar inputs does not exceed.

    Args:
        familiar: Scores of clean inputs, ``(n,)``.
        keep: Share that is answered.

    Returns:
        The limit, in the units of the score.

    Raises:
        ValueError: `keep` outside (0, 1].

    Examples:
        >>> threshold(torch.arange(1.0, 101.0))
        95.0
    """
    keep = check_share("keep", keep, ends="(]")
    ordered = check_vector(familiar, "familiar").sort().values
    return float(ordered[math.ceil(keep * len(ordered)) - 1])


def select(score: Tensor, correct: Tensor, limit: float) -> Selection:
    """Answers where the score is at most `limit` and abstains elsewhere.

    Args:
        score: Uncertainty, ``(batch,)``.
        correct: Whether the answer is right, ``(batch,)``.
        limit: See `threshold`.

    Returns:
        A `Selection`.

    Examples:
        >>> select(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([True, False, False]), 0.5)
        Selection(answered=0.6666666666666666, accuracy=0.5, errors=0.3333333333333333)
    """
    check_vector(correct, "correct", len(check_vector(score, "score")))
    answered = score <= check_number("limit", limit)
    share = float(answered.double().mean())
    errors = float((answered & ~correct.bool()).double().mean())
    return Selection(share, 1 - errors / share if share else math.nan, errors)


def uncertainty(report: Report, *, score: str = "predictive_entropy", keep: float = 0.95) -> list[Row]:
    """Calibration, entropies, detection and abstention on clean and attacked inputs of a report.

    The detector answers the share `keep` of clean inputs. Give `evaluate` an attack with
    ``loss=evading(...)`` beside the others, or the numbers flatter it.

    Args:
        report: Of one or more defenses.
        score: ``"predictive_entropy"`` or ``"mutual_information"``.
        keep: Share of clean inputs that is answered.

    Returns:
        Rows with defense, attack, eps, nll, brier, ece, predictive_entropy and mutual_information (nats,
        means), auroc with auroc_low and auroc_high, answered, selective_accuracy and errors.

    Raises:
        ValueError: unknown score.

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> report = pd.evaluate(net, (torch.rand(8, 4), torch.zeros(8).long()), {"fgsm": pd.attacks.fgsm})
        >>> [row["attack"] for row in uncertainty(report)]
        ['clean', 'fgsm']
    """
    check_member("score", score, SCORES)
    check_report(report)
    keep = check_share("keep", keep, ends="(]")
    rows: list[Row] = []
    clean: Tensor = torch.zeros(0)
    for defense, attack, eps in dict.fromkeys((r["defense"], r["attack"], r["eps"]) for r in report.rows):
        y = torch.as_tensor(report.arrays.at("labels", defense))
        if attack == "worst":  # a mixture of attacks that differs from rule to rule
            continue
        log_probs = torch.as_tensor(report.arrays.at("log_probs", defense, attack, eps))
        expected = torch.as_tensor(report.arrays.at("expected_entropy", defense, attack, eps))
        total = entropy(log_probs)
        scores = {"predictive_entropy": total, "mutual_information": (total - expected).clamp_min(0.0)}
        clean = scores[score] if attack == "clean" else clean
        area = auroc(clean, scores[score])
        chosen = select(scores[score], log_probs.argmax(-1) == y, threshold(clean, keep))
        found = calibration(log_probs, y)._asdict()
        del found["accuracy"]
        means = {name: float(values.mean()) for name, values in scores.items()}
        rows.append(
            {"defense": defense, "attack": attack, "eps": eps, **found, **means}
            | {"auroc": area.value, "auroc_low": area.low, "auroc_high": area.high}
            | {"answered": chosen.answered, "selective_accuracy": chosen.accuracy, "errors": chosen.errors}
        )
    return rows
