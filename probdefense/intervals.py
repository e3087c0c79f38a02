"""Intervals for accuracies: how far the number of this run may be from the number that is meant."""

import math

import numpy as np
from scipy.stats import norm


def wilson(successes: float, trials: float, confidence: float = 0.95) -> tuple[float, float]:
    r"""Wilson's score interval for a proportion; never degenerate, even at 0 or 100 %.

    Args:
        successes: Number right (or an effective number).
        trials: Number of independent trials (or an effective number).
        confidence: Coverage.

    References:
        Wilson, 1927, [Probable Inference, the Law of Succession, and Statistical
        Inference](https://doi.org/10.1080/01621459.1927.10502953)

    Example:
        >>> low, high = wilson(50, 100)
        >>> round(low, 3), round(high, 3)
        (0.404, 0.596)
    """
    z = float(norm.ppf(0.5 + confidence / 2))
    share = successes / trials
    center = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2)) / (1 + z**2 / trials)
    return max(0.0, center - half), min(1.0, center + half)


def accuracy_interval(
    correct: np.ndarray, *, crossed: bool = False, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval for the accuracy of the population from verdicts ``(verdicts, batch)``.

    One verdict per example gives Wilson's interval. Several give Wilson's with the number of examples
    that has the same variance: from the spread of the examples' means, plus, where all examples share
    the draws (`crossed`), the spread of the draws' means.
    """
    share, (verdicts, examples) = float(correct.mean()), correct.shape
    if verdicts == 1 or examples == 1 or share in (0.0, 1.0):
        return wilson(share * examples, examples, confidence)
    variance = correct.mean(0).var(ddof=1) / examples
    if crossed:
        variance += max(
            0.0, correct.mean(1).var(ddof=1) / verdicts - share * (1 - share) / (verdicts * examples)
        )
    trials = max(1.0, share * (1 - share) / variance) if variance > 0 else verdicts * examples
    return wilson(share * trials, trials, confidence)
