r"""Worst over norms: one number for an attacker who is held to no norm.

Robustness at one norm says little about others (Tramer and Boneh, 2019, [Adversarial Training and Robustness
for Multiple Perturbations](https://arxiv.org/abs/1904.13000)). An example counts as right if the attack of
the norm that hurts it most leaves it right.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from probdefense.evaluation.report import Report, Row, check_report, proportion
from probdefense.validation import check_kind

USUAL_RADII = {1.0: 12.0, 2.0: 0.5, math.inf: 8 / 255}
"""Radii in pixels that are in use for 32x32 color images, by norm."""

ROUNDING = 0.02
"""Probabilities of one defense on the same inputs and draws differ by less, on whatever device."""

SAME = ("num_samples", "seed", "estimand", "pixels")
"""Settings that the reports must share."""


def worst_over_norms(reports: Sequence[Report]) -> list[Row]:
    """One row per defense and rule: accuracy under the worst of several norms.

    Every report is of one norm at one radius (`USUAL_RADII` are in use for CIFAR-10), with the same data,
    seed and rules. For each example the norm counts under which the fewest of its verdicts are right. The
    verdict draws are common to the reports, so nothing is gained by luck of other draws; choosing among
    norms on them favors the attacker a little where a defense is random.

    Args:
        reports: At least two, each from `evaluate` with another ``norm=`` and one ``eps=``; where several
            attacks ran, their worst case counts.

    Returns:
        Rows with defense, attack (``"worst over norms"``), eps (every norm with its radius), rule, accuracy,
        low, high, estimand and num_examples.

    Raises:
        TypeError: something else than reports.
        ValueError: reports that do not belong together, or with several radii.

    References:
        Tramer and Boneh, 2019, [Adversarial Training and Robustness for Multiple
        Perturbations](https://arxiv.org/abs/1904.13000)

    Examples:
        >>> import torch, probdefense as pd
        >>> data, net = (torch.rand(8, 4), torch.zeros(8).long()), pd.deterministic(torch.nn.Linear(4, 3))
        >>> fgsm = {"fgsm": pd.attacks.fgsm}
        >>> several = [pd.evaluate(net, data, fgsm, norm=n, eps=0.1, name="net") for n in (1, 2, math.inf)]
        >>> [(row["defense"], row["eps"]) for row in worst_over_norms(several)][:1]
        [('net', 'l1 0.1, l2 0.1, l-inf 0.1')]
    """
    check_kind("reports", reports, (list, tuple), "give [report, ...], one per norm")
    reports = [check_report(report, "every report") for report in reports]
    _check(reports)
    places = [_place(report) for report in reports]
    eps = ", ".join(f"l{norm} {radius:.4g}" for norm, _, radius in places)
    rows = []
    for row in reports[0].rows:
        if row["attack"] != "clean":
            continue
        shared, rule = row["defense"], row["rule"]
        tables = [
            report.arrays.at("correct", shared, attack, radius, rule)
            for report, (_, attack, radius) in zip(reports, places, strict=True)
        ]
        chosen = np.stack([table.mean(0) for table in tables]).argmin(0)
        correct = np.take_along_axis(np.stack(tables), chosen[None, None, :], axis=0)[0]
        estimand = reports[0].settings.get("estimand", "population")
        found = proportion(correct, row.get("draws", "none"), estimand)
        name = {"defense": shared, "attack": "worst over norms", "eps": eps, "rule": rule}
        rows.append({**name, **found, "estimand": estimand, "num_examples": correct.shape[1]})
    return rows


def _place(report: Report) -> tuple[str, str, float]:
    """Name of the norm, attack and radius of a report.

    Raises:
        ValueError: several radii, or several attacks without their worst case.
    """
    norm = float(report.settings["norm"])
    name = "-inf" if math.isinf(norm) else f"{norm:g}"
    radii = {(row["attack"], row["eps"]) for row in report.rows if row["attack"] != "clean"}
    if len({radius for _, radius in radii}) != 1:
        raise ValueError(
            f"expected reports at one radius each, got {len({r for _, r in radii})} at norm {name}; evaluate "
            "with one eps="
        )
    attacks = {attack for attack, _ in radii}
    attack = "worst" if "worst" in attacks else sorted(attacks)[0]
    return name, attack, next(iter(radii))[1]


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether clean inputs got the same answers: verdict draws depend on the seed alone."""
    return one.shape == other.shape and bool((np.abs(one - other) < ROUNDING).all())


def _check(reports: list[Report]) -> None:
    """Refuses reports that are not of the same defenses, examples and settings at several norms.

    Raises:
        ValueError: they differ in more than the norm, or share one.
    """
    norms = [report.settings.get("norm") for report in reports]
    if len(reports) < 2 or len(set(norms)) < len(norms):
        raise ValueError(
            f"expected at least two reports of different norms, got norms {norms}; see norm= of evaluate"
        )
    first = reports[0]

    def known(report: Report) -> Any:
        kinds = [(kind, name) for kind in ("labels", "ids") for name in report.defenses]
        examples = {place: report.arrays.at(*place).tobytes() for place in kinds}
        rules = sorted({row["rule"] for row in report.rows})
        return [report.settings.get(name) for name in SAME], examples, rules

    def answers(report: Report) -> list[np.ndarray]:
        return [np.exp(report.arrays.at("log_probs", name, "clean", 0.0)) for name in report.defenses]

    for other in reports[1:]:
        if known(other) != known(first) or not all(map(_alike, answers(other), answers(first))):
            raise ValueError(
                "expected reports of the same defenses, examples, rules, draws and seed, got some that "
                "differ in more than the norm; evaluate with the same ones"
            )
