r"""Accuracy against what an attacker may ask: the number of queries, and of answers to one point.

Noise that answers queries at random slows attacks by scores and decisions down, and its claims are about
this curve. `evaluate(..., max_queries=[100, 1000])` runs every attack that takes ``max_queries`` once per
budget, by single answers unless `with_draws` averages several, each of which is a query. An attacker who may
submit one point $m$ times wins if one answer errs; of $n$ verdict draws, $k$ of them right, the share of
right $m$-tuples is

$$ \binom{k}{m} \Big/ \binom{n}{m} $$
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from probdefense.evaluation.intervals import wilson
from probdefense.evaluation.points import WithDraws, configuration, with_draws
from probdefense.evaluation.report import Report, Row, check_report
from probdefense.types import Attack
from probdefense.validation import check_attack, check_count, check_kind

ANSWERS = (1, 2, 5, 10, 20, 50)
"""Numbers of answers to one point."""


def by_queries(
    attacks: Mapping[str, Attack], max_queries: Sequence[int] | None
) -> tuple[dict[str, Attack], dict[str, int]]:
    """The attacks, those by queries once per budget as ``"square@100"``, and the budgets by these names.

    Raises:
        ValueError: no attack takes ``max_queries``, no budgets, or an attack of the name that one gets.
    """
    if max_queries is None:
        return dict(attacks), {}
    check_kind("max_queries", max_queries, (list, tuple), "give a list of budgets, as in [100, 1000]")
    budgets = sorted({check_count("max_queries", each) for each in max_queries})
    expanded: dict[str, Attack] = {}
    asked: dict[str, int] = {}
    for label, attack in attacks.items():
        check_attack(attack, f"attack {label!r}")
        if "max_queries" not in configuration(attack)[0]:
            expanded[label] = attack
            continue
        for budget in budgets:
            one: Attack = partial(attack, max_queries=budget)
            expanded[f"{label}@{budget}"] = one if _has_draws(attack) else with_draws(one, 1)
            asked[f"{label}@{budget}"] = budget
    if clash := [label for label in asked if label in attacks]:
        raise ValueError(
            f"expected names of attacks that differ from those of budgets, got {clash[0]!r}, which is one "
            "with its budget; take another name"
        )
    if not asked:
        raise ValueError(
            f"expected an attack that takes max_queries, such as attacks.square, and budgets, got "
            f"{', '.join(attacks) or 'no attack'} and {list(budgets)}"
        )
    return expanded, asked


def query_curve(report: Report, attack: str, rule: str, *, defense: str | None = None) -> list[Row]:
    """Accuracy against the number of queries, as rows with max_queries, accuracy, low and high.

    Args:
        report: Of `evaluate` with ``max_queries=``.
        attack: Its name as it was given, without the budget.
        rule: The rule's name.
        defense: Its name; needed where the report holds several.

    Returns:
        One row per budget and radius, clean inputs first, with 0 queries.

    Raises:
        ValueError: no such rows.

    Examples:
        >>> import torch, probdefense as pd
        >>> data, net = (torch.rand(8, 4), torch.zeros(8).long()), pd.deterministic(torch.nn.Linear(4, 3))
        >>> report = pd.evaluate(net, data, {"square": pd.attacks.square}, max_queries=[5, 20])
        >>> [row["max_queries"] for row in query_curve(report, "square", "mean_prob")]
        [0, 5, 20]
    """
    report = check_report(report)
    clean = report.row(attack="clean", rule=rule, **({} if defense is None else {"defense": defense}))
    rows = [
        row
        for row in report.rows
        if row["rule"] == rule
        and row["defense"] == clean["defense"]
        and row["attack"].startswith(f"{attack}@")
    ]
    if not rows:
        known = ", ".join(dict.fromkeys(row["attack"] for row in report.rows))
        raise ValueError(f"expected an attack that ran by max_queries, got {attack!r}; known: {known}")
    kept = ("max_queries", "eps", "accuracy", "low", "high")
    return [{**{k: ({"max_queries": 0} | row)[k] for k in kept}} for row in [clean, *rows]]


def resubmission_curve(
    report: Report,
    attack: str,
    *,
    eps: float | None = None,
    answers: Sequence[int] = ANSWERS,
    defense: str | None = None,
) -> list[Row]:
    r"""Accuracy if an attacker may submit every point $m$ times and wins at one wrong answer.

    The mean over examples of the share of right $m$-tuples of verdict draws, without a lucky choice of which
    come first; the variance is that of new examples plus the jackknife's over draws.

    Args:
        report: Of `evaluate` with the rule `single_draw` and more draws than the largest `answers`.
        attack: Its name in the report.
        eps: The radius; needed where the attack ran at several.
        answers: $m$, those beyond the number of draws are left out.
        defense: Its name; needed where the report holds several.

    Returns:
        Rows with answers, accuracy, low and high (95 %).

    Raises:
        ValueError: no such row, or no verdicts of single draws.

    References:
        Daeubener and Fischer, 2022, [How Sampling Impacts the Robustness of Stochastic Neural
        Networks](https://arxiv.org/abs/2204.10839)

    Examples:
        >>> import torch, probdefense as pd
        >>> defense = pd.defenses.rse(torch.nn.Linear(4, 3), before_linear=True)
        >>> report = pd.evaluate(defense, (torch.rand(8, 4), torch.zeros(8).long()), num_samples=10)
        >>> [row["answers"] for row in resubmission_curve(report, "clean")]
        [1, 2, 5, 10]
    """
    report = check_report(report)
    wanted: dict[str, Any] = {"attack": attack, "rule": "single_draw"}
    wanted |= {name: value for name, value in {"eps": eps, "defense": defense}.items() if value is not None}
    row = report.row(**wanted)
    table = report.arrays.at("correct", row["defense"], attack, row["eps"], "single_draw").astype(float)
    check_kind("answers", answers, (list, tuple, range), "give numbers of answers, as in [1, 2, 5]")
    counts = [check_count("answers", each) for each in answers]
    return [_resubmitted(table, each) for each in counts if each <= len(table)]


def _resubmitted(table: np.ndarray, answers: int) -> Row:
    """One point of the curve from verdicts ``(draws, batch)``."""
    draws, examples = table.shape
    right = table.sum(0)
    each = _tuples(right, draws, answers)
    share, variance = float(each.mean()), float(each.var(ddof=1)) / examples if examples > 1 else 0.0
    if draws > answers:
        without = np.array([_tuples(right - one, draws - 1, answers).mean() for one in table])
        variance += (draws - 1) * float(np.square(without - without.mean()).mean())
    trials = max(1.0, share * (1 - share) / variance) if variance > 0 else float(examples)
    low, high = wilson(share * trials, trials)
    return {"answers": answers, "accuracy": share, "low": low, "high": high}


def _tuples(right: np.ndarray, draws: int, answers: int) -> np.ndarray:
    """The share of tuples of different draws that are right throughout, ``(batch,)``."""
    factors = [(right - k).clip(0) / (draws - k) for k in range(answers)]
    return np.prod(factors, axis=0)


def _has_draws(attack: Attack) -> bool:
    """Whether `with_draws` has set the draws per call."""
    while isinstance(attack, partial):
        attack = attack.func
    return isinstance(attack, WithDraws)
