r"""Is one defense more robust than another? Differences on the same examples, draws and training seeds.

With several training seeds the differences form a table of seeds by examples, and both are samples:
of the networks that the methods could have made, and of the images that could have come. The variance
of the mean difference has a part from each (see `intervals`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from probdefense.evaluation.arrays import Arrays
from probdefense.evaluation.intervals import Spread, holm, mean_spread
from probdefense.evaluation.report import Report, Row, check_report
from probdefense.tables import chance, format_table, html_table
from probdefense.validation import check_member

COLUMNS = ("a", "b", "attack", "eps", "rule", "difference", "low", "high", "p_holm", "probability")

SAME = ("norm", "num_samples", "seed", "estimand")
"""Settings that two reports must share for their verdicts to be comparable."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """Paired differences in accuracy between defenses.

    Attributes:
        rows: One dict per pair of defenses and row of their reports: a, b, attack, eps, rule,
            accuracy_a, accuracy_b, difference (a minus b), low, high (95 %), p (two-sided), p_holm
            (adjusted over all rows), probability (that a beats b), seed_spread (standard deviation of the
            difference between training seeds, None for one), estimand, num_seeds, num_examples.
        num_seeds: Training seeds behind it.
    """

    rows: list[Row]
    num_seeds: int

    def __repr__(self) -> str:
        return f"Comparison on {self.rows[0]['num_examples']} examples, differences in points\n{self.table()}"

    def _repr_html_(self) -> str:
        title = "Comparison: difference in accuracy, a minus b, in points"
        return html_table(self._shown, COLUMNS, title, notes=[self.scope])

    @property
    def _shown(self) -> list[Row]:
        """The rows with probabilities cut where nothing can be told apart."""
        names = ("p", "p_holm", "probability")
        return [row | {name: chance(row[name]) for name in names if name in row} for row in self.rows]

    @property
    def scope(self) -> str:
        """What the numbers are about."""
        if self.num_seeds == 1:
            return (
                "one training seed: about these networks, not these methods (training anew moves robust "
                "accuracy by points); give one report per seed"
            )
        scope = f"{self.num_seeds} training seeds: about these methods, trained anew"
        few = "; two say little about how training varies, so intervals are wide: give three or more"
        return scope + few if self.num_seeds == 2 else scope

    def table(self, columns: Sequence[str] = COLUMNS) -> str:
        """The rows as aligned text, differences in percentage points, under what they are about."""
        return self.scope + "\n" + format_table(self._shown, columns)


def compare(reports_a: Report | Sequence[Report], reports_b: Report | Sequence[Report]) -> Comparison:
    r"""Compares two defenses on every attack, radius and rule that their reports share.

    The interval is Student's with the variance of a two-way table of seeds and examples and
    Satterthwaite's degrees of freedom, and the probability that A beats B is the posterior one under a
    flat prior, $F_t(\bar d / s)$. This is used rather than a bootstrap over seeds and examples because
    few seeds do not bootstrap: where seeds matter, 95 % intervals from 3 and 5 seeds cover 89 and 92 % by
    bootstrap and 93 and 95 % this way (``benchmarks/coverage.py``). From two seeds it would cover 87 %, so
    there it is widened, to one degree of freedom where seeds matter most: 93 %. Two pseudo-examples,
    one won by each side, keep the interval from collapsing where no example differs. With one seed the
    draws of the verdict take the place of the seeds.

    Args:
        reports_a: One report per training seed, each of one defense (`Report.only` picks one).
        reports_b: As many, evaluated with the same seeds on the same examples, so that verdict draws
            are shared.

    Returns:
        A `Comparison`.

    Raises:
        ValueError: reports that do not belong together, or share no row.

    References:
        Bonett and Price, 2012, [Adjusted Wald Confidence Interval for a Difference of Binomial
        Proportions Based on Paired Data](https://doi.org/10.3102/1076998611411915); Bouthillier et al.,
        2021, [Accounting for Variance in Machine Learning Benchmarks](https://arxiv.org/abs/2103.03098)

    Examples:
        >>> import torch, probdefense as pd
        >>> data = torch.rand(40, 4), torch.randint(3, (40,))
        >>> a, b = (pd.evaluate(pd.deterministic(torch.nn.Linear(4, 3)), data, name=n) for n in "ab")
        >>> print(compare(a, b).scope.partition(":")[0])
        one training seed
    """
    sides = [_several(reports) for reports in (reports_a, reports_b)]
    _check(*sides)
    return Comparison(_adjusted(_rows(*sides)), len(sides[0]))


def compare_all(reports: Report | Sequence[Report], *, rule: str | None = None) -> Comparison:
    """Compares every pair of the defenses in reports, with Holm's adjustment over all of it.

    Args:
        reports: One report per training seed, each of the same defenses.
        rule: The one rule to compare by; every rule of the reports by default.

    Returns:
        A `Comparison`.

    Raises:
        ValueError: fewer than two defenses, or reports that do not belong together.

    Examples:
        >>> import torch, probdefense as pd
        >>> data = torch.rand(40, 4), torch.randint(3, (40,))
        >>> a, b = (pd.evaluate(pd.deterministic(torch.nn.Linear(4, 3)), data, name=n) for n in "ab")
        >>> len(compare_all(a + b, rule="mean_prob").rows)
        1
    """
    reports = _several(reports)
    names = reports[0].defenses if reports else []
    if len(names) < 2:
        raise ValueError(
            f"expected reports of at least two defenses, got {len(names)}; add the reports of several up"
        )
    if rule is not None:
        check_member("rule", rule, {row["rule"] for report in reports for row in report.rows})
    rows: list[Row] = []
    for a, b in itertools.combinations(names, 2):
        sides = [[report.only(name) for report in reports] for name in (a, b)]
        _check(*sides)
        rows += [row for row in _rows(*sides) if rule in (None, row["rule"])]
    return Comparison(_adjusted(rows), len(reports))


def _several(reports: Any) -> list[Report]:
    """One report or several, as a list.

    Raises:
        TypeError: something else.
        ValueError: a report without rows, or one that is given twice.
    """
    given = [reports] if not isinstance(reports, list | tuple) else reports
    several = [check_report(report, "every report") for report in given]
    if any(is_same(*pair) for pair in itertools.combinations(several, 2)):
        raise ValueError(
            f"expected one report per seed of the training of {', '.join(several[0].defenses)}, got the same "
            "report twice; give each once"
        )
    return several


def is_same(one: Report, other: Report) -> bool:
    """Whether two reports are one and the same: what is counted twice narrows every interval."""
    keys = [Arrays.key("fingerprint", name) for name in one.defenses]
    seen = [{*report.arrays[key].tolist()} for key in keys for report in (one, other) if key in report.arrays]
    known = len(seen) == 2 * len(keys) and seen[::2] == seen[1::2]
    return one is other or (known and one.settings == other.settings and one.rows == other.rows)


class Place(NamedTuple):
    """Which number of a report: attack, radius and rule."""

    attack: str
    eps: float
    rule: str


def paired(differences: np.ndarray) -> tuple[float, Spread]:
    """Mean and spread of a table of paired differences in [-1, 1], ``(seeds or draws, examples)``.

    Two pseudo-examples, one won by each side, are added.
    """
    pseudo = np.tile([1.0, -1.0], (len(differences), 1))
    values = np.concatenate([differences, pseudo], axis=1)
    return float(values.mean()), mean_spread(values, crossed=True)


def _rows(side_a: list[Report], side_b: list[Report]) -> list[Row]:
    """One row per number that all reports share, without the adjustment."""
    shared = [place for place in _places(side_a[0]) if all(place in _places(r) for r in [*side_a, *side_b])]
    if not shared:
        raise ValueError(
            "expected reports with a row in common, got some that share no attack, eps and rule; evaluate "
            "both sides with the same ones"
        )
    rows: list[Row] = []
    for place in shared:
        tables = [[_correct(report, place) for report in side] for side in (side_a, side_b)]
        center, spread = paired(_differences(*tables))
        half = spread.half_width()
        means = [float(np.mean([table.mean() for table in side])) for side in tables]
        rows.append(
            {
                "a": side_a[0].defenses[0],
                "b": side_b[0].defenses[0],
                **place._asdict(),
                "accuracy_a": means[0],
                "accuracy_b": means[1],
                "difference": means[0] - means[1],
                "low": max(-1.0, center - half),
                "high": min(1.0, center + half),
                "p": 2 * min(spread.p_value(center), spread.p_value(-center)),
                "probability": 1 - spread.p_value(center),
                "seed_spread": _between(*tables),
                "estimand": side_a[0].settings.get("estimand", "population"),
                "num_seeds": len(side_a),
                "num_examples": tables[0][0].shape[1],
            }
        )
    return rows


def _differences(tables_a: list[np.ndarray], tables_b: list[np.ndarray]) -> np.ndarray:
    """Seeds by examples, averaged over draws; with one seed draws by examples, where both have as many."""
    if len(tables_a) > 1:
        return np.stack([a.mean(0) - b.mean(0) for a, b in zip(tables_a, tables_b, strict=True)])
    a, b = tables_a[0].astype(float), tables_b[0].astype(float)
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        a, b = a.mean(0, keepdims=True), b.mean(0, keepdims=True)
    return a - b


def _between(tables_a: list[np.ndarray], tables_b: list[np.ndarray]) -> float | None:
    """Standard deviation of the difference in accuracy between training seeds."""
    means = [float(a.mean() - b.mean()) for a, b in zip(tables_a, tables_b, strict=True)]
    return float(np.std(means, ddof=1)) if len(means) > 1 else None


def _adjusted(rows: list[Row]) -> list[Row]:
    adjusted = holm([row["p"] for row in rows])
    return [{**row, "p_holm": p} for row, p in zip(rows, adjusted, strict=True)]


def _places(report: Report) -> list[Place]:
    return [Place(row["attack"], row["eps"], row["rule"]) for row in report.rows]


def _correct(report: Report, place: Place) -> np.ndarray:
    return report.arrays.at("correct", report.defenses[0], *place)


def _check(side_a: list[Report], side_b: list[Report]) -> None:
    """Refuses reports whose verdicts cannot be paired.

    Raises:
        ValueError: other counts, settings or examples, or several defenses in a report.
    """
    if len(side_a) != len(side_b) or not side_a:
        raise ValueError(
            f"expected one report per seed on both sides, got {len(side_a)} and {len(side_b)}; give lists of "
            "one length"
        )
    for side in (side_a, side_b):
        names = {name for report in side for name in report.defenses}
        if len(names) != 1 or any(len(report.defenses) != 1 for report in side):
            raise ValueError(
                f"expected reports of one defense on each side, got {', '.join(sorted(names))}; "
                "pick one with report.only(name), or use compare_all"
            )
    for a, b in zip(side_a, side_b, strict=True):
        differ = [name for name in SAME if a.settings.get(name) != b.settings.get(name)]
        if differ:
            raise ValueError(
                f"expected reports of the same settings, got some that cannot be paired: {', '.join(differ)} "
                "differ; evaluate both sides with the same ones"
            )
    seen = [report.arrays.examples(report.defenses[0]) for report in [*side_a, *side_b]]
    if any(not np.array_equal(seen[0], other) for other in seen[1:]):
        raise ValueError(
            "expected reports on the same examples, got some that cannot be paired: they are about other "
            "examples; evaluate both sides on the same data"
        )
