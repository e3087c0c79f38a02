r"""Intervals for accuracies: how far the number of this run may be from the number that is meant.

Verdicts form a table of draws by examples. When every example shares the draws (random weights), both
are random effects and the variance of the grand mean has three parts, estimated by the mean squares of
a two-way analysis of variance:

$$ \mathrm{Var}(\bar x) = \frac{MS_{\text{examples}} + MS_{\text{draws}} - MS_{\text{rest}}}{nS} $$
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from probdefense.validation import check_member

ESTIMANDS = ("population", "test set")
"""What an accuracy is about: new examples and new draws, or these examples and new draws."""


def wilson(
    successes: float, trials: float, confidence: float = 0.95, dof: float = math.inf
) -> tuple[float, float]:
    r"""Wilson's score interval for a proportion; never degenerate, even at 0 or 100 %.

    Args:
        successes: Number right (or an effective number).
        trials: Number of independent trials (or an effective number).
        confidence: Coverage.
        dof: Degrees of freedom behind an effective number of trials; the quantile is Student's.

    References:
        Wilson, 1927, [Probable Inference, the Law of Succession, and Statistical
        Inference](https://doi.org/10.1080/01621459.1927.10502953)

    Examples:
        >>> low, high = wilson(50, 100)
        >>> round(low, 3), round(high, 3)
        (0.404, 0.596)
    """
    z = student_quantile(0.5 + confidence / 2, dof)
    share = successes / trials
    center = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2)) / (1 + z**2 / trials)
    # At 0 and 1 the two ends meet the share, but for rounding.
    return min(share, max(0.0, center - half)), max(share, min(1.0, center + half))


def accuracy_interval(
    correct: np.ndarray,
    *,
    crossed: bool = False,
    random: bool = True,
    estimand: str = "population",
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Interval for an accuracy from a table of verdicts.

    One verdict per example gives Wilson's interval. Several give Wilson's with the number of trials
    that has the same variance, and Student's quantile with Satterthwaite's degrees of freedom. This
    closed form is used rather than a bootstrap over examples and draws because it covers better: in
    simulation (``benchmarks/coverage.py``) 93-97 % for accuracies in [.1, .9] with shared and with
    independent draws, and at least 92 % from .02 to .98, where the bootstrap falls to 90 %; and it does
    not collapse at 0 or 100 %.

    Args:
        correct: Verdicts, ``(verdicts, batch)``.
        crossed: Whether all examples share the draws, as they do where weights are random.
        random: Whether new draws could give other verdicts.
        estimand: ``"population"``, new examples; or ``"test set"``, these examples and new draws, which
            is exact where nothing is random. One verdict per example says nothing of other draws:
            then the first is about the draws that were made, and the second is an upper bound on the
            width, Wilson's as well.
        confidence: Coverage.

    Returns:
        ``(low, high)``.

    Raises:
        ValueError: unknown estimand.

    References:
        Satterthwaite, 1946, [An Approximate Distribution of Estimates of Variance
        Components](https://doi.org/10.2307/3002019); Owen, 2007, [The Pigeonhole
        Bootstrap](https://doi.org/10.1214/07-AOAS122)

    Examples:
        >>> verdicts = np.array([[True, True, False, True], [True, False, False, True]])
        >>> low, high = accuracy_interval(verdicts)
        >>> bool(low < verdicts.mean() < high)
        True
    """
    check_member("estimand", estimand, ESTIMANDS)
    share, (verdicts, examples) = float(correct.mean()), correct.shape
    fixed = estimand == "test set"
    if fixed and not random:
        return share, share
    if verdicts == 1 or examples == 1 or share in (0.0, 1.0):
        trials = examples * verdicts if (fixed and not crossed) or examples == 1 else examples
        return wilson(share * trials, trials, confidence)
    spread = _over_draws(correct, crossed) if fixed else _over_both(correct, crossed)
    trials = max(1.0, share * (1 - share) / spread.variance) if spread.variance > 0 else correct.size
    return wilson(share * trials, trials, confidence, spread.dof)


def resampled_interval(
    right: np.ndarray, without: np.ndarray, confidence: float = 0.95
) -> tuple[float, float]:
    r"""Interval for an accuracy whose examples share draws, over new examples and new draws, by jackknife.

    Verdicts $v_i$ were taken again without each of $B$ blocks of draws. What the accuracy moves by beyond
    what the examples would each on their own is the part of the shared draws,

    $$ \frac{B - 1}{B} \sum_b \Big[ (\bar v^{(-b)} - \bar v^{(-\cdot)})^2
       - \frac{1}{n^2} \sum_i (v_i^{(-b)} - v_i^{(-\cdot)})^2 \Big] $$

    and adds to $\bar v (1 - \bar v) / n$; Wilson's interval gets the number of trials with that variance.

    Args:
        right: Verdicts with all draws, ``(batch,)``.
        without: Verdicts without each block, ``(blocks, batch)``.
        confidence: Coverage.

    References:
        Efron and Stein, 1981, [The Jackknife Estimate of
        Variance](https://doi.org/10.1214/aos/1176345462)
    """
    share, (blocks, examples) = float(right.mean()), without.shape
    if not 0 < share < 1:
        return wilson(share * examples, examples, confidence)
    moved = without - without.mean(0)
    jointly, alone = np.square(moved.mean(1)).sum(), np.square(moved).sum() / examples**2
    shared = max(0.0, float(jointly - alone)) * (blocks - 1) / blocks
    own = share * (1 - share) / examples
    dof = (own + shared) ** 2 / max(shared**2 / (blocks - 1), own**2 / 1e9)
    trials = max(1.0, share * (1 - share) / (own + shared))
    return wilson(share * trials, trials, confidence, dof)


class Spread(NamedTuple):
    """Variance of a mean, and the degrees of freedom with which it is known."""

    variance: float
    dof: float

    def p_value(self, excess: float) -> float:
        """One-sided p-value that a mean is above zero by chance, given its estimate."""
        if self.variance <= 0:
            return float(excess <= 0)
        from scipy.special import stdtr

        return float(stdtr(self.dof, -excess / math.sqrt(self.variance)))

    def half_width(self, confidence: float = 0.95) -> float:
        """Half of the interval around the mean."""
        return student_quantile(0.5 + confidence / 2, self.dof) * math.sqrt(self.variance)


def student_quantile(level: float, dof: float) -> float:
    """Quantile of Student's distribution; the normal one with infinite degrees of freedom.

    Examples:
        >>> round(student_quantile(0.975, math.inf), 2), round(student_quantile(0.975, 2), 2)
        (1.96, 4.3)
    """
    from scipy.special import stdtrit

    return float(stdtrit(dof, level))


def mean_spread(values: np.ndarray, *, crossed: bool, example_variance: float = 0.0) -> Spread:
    """Spread of the grand mean of a table ``(rows, examples)``, both drawn from populations.

    Args:
        values: One row per draw or training seed; one row alone counts as given.
        crossed: Whether a row has an effect that all its examples share.
        example_variance: Added to the part that examples explain.
    """
    rows, examples = values.shape
    size = values.size
    by_example = rows * values.mean(0).var(ddof=1) / size
    part, dof = by_example + example_variance, float(examples - 1)
    if not crossed or rows == 1:
        return Spread(part, dof)
    by_row = examples * values.mean(1).var(ddof=1) / size
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    by_rest = float(np.square(rest).sum()) / ((rows - 1) * (examples - 1)) / size
    # The difference may come out negative by chance; half of what the examples explain is a floor.
    variance = max(part + by_row - by_rest, part / 2)
    if variance == 0:
        return Spread(0.0, dof)
    noise = part**2 / dof + by_row**2 / (rows - 1) + by_rest**2 / ((rows - 1) * dof)
    known = variance**2 / noise
    # Two rows know little of how far they are apart: nothing is taken off, one degree may be all there is.
    return Spread(part + by_row, max(1.0, known)) if rows == 2 else Spread(variance, max(2.0, known))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: the chance that any of them misleads stays below the level.

    References:
        Holm, 1979, [A Simple Sequentially Rejective Multiple Test
        Procedure](https://www.jstor.org/stable/4615733)

    Examples:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _over_both(correct: np.ndarray, crossed: bool) -> Spread:
    """Of new examples and new draws.

    Near 0 and 100 % the errors seen may rest on few examples; the variance of one more such example
    is added, weighed by how far they do, up to the variance of examples that are right or wrong for good.
    """
    share, examples = correct.mean(), correct.shape[1]
    wrong = correct.mean(0) if share < 0.5 else 1 - correct.mean(0)
    concentration = float(np.square(wrong).sum()) / float(wrong.sum()) ** 2
    known = float(correct.mean(0).var(ddof=1)) / examples
    added = min(concentration / examples**2, max(0.0, share * (1 - share) / examples - known))
    return mean_spread(correct, crossed=crossed, example_variance=added)


def _over_draws(correct: np.ndarray, crossed: bool) -> Spread:
    """Of new draws on the same examples."""
    verdicts, examples = correct.shape
    if crossed:
        return Spread(float(correct.mean(1).var(ddof=1)) / verdicts, verdicts - 1)
    within = float(correct.var(axis=0, ddof=1).mean())
    return Spread(within / correct.size, examples * (verdicts - 1))
