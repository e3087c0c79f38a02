"""Pictures of reports, one per function: each takes data and axes, and returns the axes.

Without ``ax=`` a new figure is made with pyplot. Shares are in percent, radii in pixels, entropies in
nats; intervals are those of the report.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from probdefense.analysis.curves import RobustnessCurve
from probdefense.analysis.style import (
    COLORS,
    MUTED,
    cycle,
    heading,
    label_ends,
    new_axes,
    note,
    percent,
    quiet,
    short,
)
from probdefense.evaluation.arrays import exact
from probdefense.evaluation.certification import Certificate
from probdefense.evaluation.queries import query_curve
from probdefense.evaluation.report import Report, Row, check_report
from probdefense.types import Labels
from probdefense.validation import check_kind, check_labels, check_member, check_positive


def accuracy_chart(
    report: Report, *, rule: str | None = None, eps: float | None = None, ax: Any = None
) -> Any:
    """Accuracy of every defense, clean and under each attack, as dots with intervals.

    Args:
        report: One or several defenses.
        rule: Which rule; the first of the report by default.
        eps: Which radius; the largest by default.
        ax: Axes to draw on.

    Returns:
        The axes.

    Examples:
        >>> import probdefense as pd
        >>> data = torch.rand(20, 4), torch.randint(3, (20,))
        >>> report = pd.evaluate(pd.deterministic(torch.nn.Linear(4, 3)), data, {"fgsm": pd.attacks.fgsm})
        >>> [text.get_text() for text in accuracy_chart(report).texts if "[" not in text.get_text()][0]
        'defense'
    """
    rule = rule_of(report, rule)
    radii = sorted({row["eps"] for row in report.rows})
    if eps is not None and check_positive("eps", eps, zero=True) not in radii:
        raise ValueError(
            f"expected eps as one of the report's, {', '.join(map(exact, radii))}, got {eps}; known: these"
        )
    eps = max(radii) if eps is None else eps
    rows = [r for r in report.rows if r["rule"] == rule and r["eps"] in (eps, 0.0)]
    rows.sort(key=lambda row: (row["eps"] > 0, row["attack"] != "worst"))  # as in tables
    ax = new_axes(ax, (4.8, 0.9 + 0.21 * (len(rows) + 1.4 * len(report.defenses))))
    height, ticks = 0.0, []
    for defense in report.defenses:
        height -= 1.4
        ax.text(0, height + 0.75, short(defense), fontweight="bold", va="center", parse_math=False)
        for row in (row for row in rows if row["defense"] == defense):
            height -= 1.0
            ticks.append((height + 0.75, short(row["attack"], 20)))
            color = {"clean": MUTED, "worst": COLORS[1]}.get(row["attack"], COLORS[0])
            ax.plot([row["low"], row["high"]], [height + 0.75] * 2, color=color, linewidth=2, alpha=0.45)
            ax.plot(row["accuracy"], height + 0.75, "o", color=color, markersize=6, clip_on=False)
            ax.text(1.02, height + 0.75, _percent_and_interval(row), fontsize=8.5, va="center")
    quiet(ax, "x").set_yticks([at for at, _ in ticks], [name for _, name in ticks], parse_math=False)
    percent(ax, "x")
    ax.set_ylim(height + 0.2, 0.0)
    count = rows[0]["num_examples"]
    about = f"{norm_name(report)} radius {eps:g}, rule {rule}, {count} examples, 95 % intervals"
    heading(ax, "Accuracy", about)
    return ax


def accuracy_against_queries(
    report: Report, attack: str, *, rule: str | None = None, eps: float | None = None, ax: Any = None
) -> Any:
    """Accuracy against the number of queries that an attack may ask, one line per defense, with intervals.

    Args:
        report: Of `evaluate` with ``max_queries=``.
        attack: Its name as it was given.
        rule: Which rule; the first of the report by default.
        eps: Which radius; the largest by default.
        ax: Axes to draw on.

    Returns:
        The axes.

    Examples:
        >>> import probdefense as pd
        >>> data, net = (torch.rand(20, 4), torch.randint(3, (20,))), pd.deterministic(torch.nn.Linear(4, 3))
        >>> report = pd.evaluate(net, data, {"square": pd.attacks.square}, max_queries=[5, 20])
        >>> accuracy_against_queries(report, "square").get_xlabel()
        'queries per image'
    """
    rule = rule_of(report, rule)
    ax = new_axes(ax, (4.8, 4.0))
    for color, defense in zip(cycle(len(report.defenses)), report.defenses, strict=True):
        rows = query_curve(report, attack, rule, defense=defense)
        radius = max(row["eps"] for row in rows) if eps is None else eps
        rows = [row for row in rows if row["eps"] in (0.0, radius)]
        at = [max(1, row["max_queries"]) for row in rows]
        ax.plot(at, [row["accuracy"] for row in rows], "o-", color=color, markersize=4, label=defense)
        ax.fill_between(
            at, [row["low"] for row in rows], [row["high"] for row in rows], color=color, alpha=0.15
        )
    quiet(ax).set_xscale("log")
    percent(ax, "y")
    ax.set_xlabel("queries per image")
    for text in ax.legend(frameon=False).get_texts():
        text.set_parse_math(False)
    heading(ax, "Accuracy against queries", f"{attack}, {norm_name(report)} radius {radius:g}, rule {rule}")
    return ax


def robustness_curves(
    source: RobustnessCurve | Report, *, attack: str | None = None, rule: str | None = None, ax: Any = None
) -> Any:
    """Accuracy as a function of the radius: posterior bands of a curve, or the intervals of a report.

    Args:
        source: From `robustness_curve` (median and 95 % band, with what was measured as dots), or a
            report over several radii or of a minimum-norm attack.
        attack: Which attack of a report; by default the last that every defense was under.
        rule: Which rule of a report; the first by default.
        ax: Axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: no attack that every defense was under.

    Examples:
        >>> import probdefense as pd
        >>> data = torch.rand(20, 4), torch.randint(3, (20,))
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> report = pd.evaluate(net, data, {"fgsm": pd.attacks.fgsm}, eps=[0.1, 0.2])
        >>> robustness_curves(report).get_xlabel()
        'radius (pixels)'
    """
    if not isinstance(source, RobustnessCurve):
        rule, attack = rule_of(source, rule), _attack_of(source, attack)
    ax = new_axes(ax, (4.8, 4.0))
    if isinstance(source, RobustnessCurve):
        ends, about = _draw_bands(ax, source), "posterior median and 95 % band; dots are measured"
    else:
        assert rule is not None and attack is not None
        ends, about = {}, f"attack {attack}, rule {rule}, 95 % intervals"
        for name, color in zip(source.defenses, cycle(len(source.defenses)), strict=True):
            ends[name] = _draw_rows(ax, source.curve(attack, rule, defense=name), "eps", color)
    quiet(ax).set_xlabel("radius (pixels)")
    percent(ax, "y")
    right = max(x for x, _ in ends.values())
    ax.set_xlim(0, right)
    ax.locator_params(axis="x", nbins=6)
    label_ends(ax, list(ends), right, [y for _, y in ends.values()], cycle(len(ends)))
    heading(ax, "Robust accuracy", about)
    return ax


def certified_vs_empirical(
    certificate: Any,
    y: Labels,
    report: Report | None = None,
    *,
    attack: str | None = None,
    rule: str | None = None,
    ax: Any = None,
) -> Any:
    """Accuracy certified at each radius, beside the accuracy that an attack in the same norm leaves.

    Args:
        certificate: From `certify`.
        y: True classes, ``(batch,)``.
        report: The same defense attacked in the norm of the certificate, at several radii or of minimum norm.
        attack: Which attack of the report; the last by default.
        rule: Which rule of the report; the first by default.
        ax: Axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: a report in another norm.

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.defenses.rse(pd.models.small_cnn(), sigma_init=0.25)
        >>> certificate = pd.certify(defense, torch.rand(2, 1, 8, 8), n0=10, n=100)
        >>> certified_vs_empirical(certificate, torch.tensor([0, 1])).get_xlabel()
        'L2 radius (pixels)'
    """
    check_kind("certificate", certificate, Certificate, "probdefense.certify(...) makes one")
    check_labels(y, len(certificate.label))
    norm = f"{certificate.norm:g}"
    if report is not None:
        rule = rule_of(report, rule)
        if str(report.settings.get("norm")) != norm:
            raise ValueError(
                f"expected a report in the L{norm} norm, got norm {report.settings.get('norm')}; evaluate "
                f"with norm={norm}"
            )
    ax, reach = new_axes(ax, (4.8, 4.0)), 1.1 * max(float(certificate.radius.max()), 1e-6)
    if report is not None and rule is not None:
        rows = report.curve(attack or report.rows[-1]["attack"], rule)
        reach = max(reach, _draw_rows(ax, rows, "eps", COLORS[1])[0])
        middle = rows[len(rows) // 2]
        note(ax, "left by the attack", (middle["eps"], middle["accuracy"]), (8, 8), color=COLORS[1])
    certified = certificate.curve(y, np.linspace(0.0, reach, 400).tolist())
    radii, shares = ([row[name] for row in certified] for name in ("eps", "accuracy"))
    ax.fill_between(radii, shares, color=COLORS[0], alpha=0.15, linewidth=0)
    ax.plot(radii, shares, color=COLORS[0], linewidth=2)
    note(ax, "certified", (0, 0), (8, 8), color=COLORS[0])
    quiet(ax).set_xlabel(f"L{norm} radius (pixels)")
    percent(ax, "y")
    ax.set_xlim(0, reach)
    ax.locator_params(axis="x", nbins=6)
    heading(ax, "Certified and empirical accuracy", "no attack can leave less than what is certified")
    return ax


def eot_convergence(
    report: Report, *, rule: str | None = None, attacks: Sequence[str] | None = None, ax: Any = None
) -> Any:
    """Robust accuracy against the draws per gradient step, at one budget of gradients.

    Args:
        report: Of attacks that differ in their draws per call, as by `with_draws`.
        rule: Which rule; the first by default.
        attacks: Which attacks; all that have draws by default.
        ax: Axes to draw on.

    Returns:
        The axes; the title says the budget, or that it differs.

    Raises:
        ValueError: no such attacks.

    Examples:
        >>> import probdefense as pd
        >>> data = torch.rand(5, 1, 8, 8), torch.randint(10, (5,))
        >>> fgsm = {f"fgsm {count}": pd.with_draws(pd.attacks.fgsm, count) for count in (1, 4)}
        >>> report = pd.evaluate(pd.defenses.rse(pd.models.small_cnn()), data, fgsm, num_samples=2)
        >>> eot_convergence(report).get_xlabel()
        'draws per gradient step'
    """
    rule = rule_of(report, rule)
    reach = max(row["eps"] for row in report.rows)
    rows = [r for r in report.rows if (r["rule"], r["eps"]) == (rule, reach) and r["attack_samples"]]
    rows = [row for row in rows if attacks is None or row["attack"] in attacks]
    if not rows:
        raise ValueError(
            "expected attacks with draws per call, got none; evaluate with_draws(attack, 16) and others"
        )
    rows.sort(key=lambda row: row["attack_samples"])
    ax, ends = new_axes(ax, (4.8, 3.8)), {}
    names = list(dict.fromkeys(row["defense"] for row in rows))
    for name, color in zip(names, cycle(len(names)), strict=True):
        ends[name] = _draw_rows(ax, [r for r in rows if r["defense"] == name], "attack_samples", color)
    draws = sorted({row["attack_samples"] for row in rows})
    quiet(ax).set_xscale("log", base=2)
    ax.set_xticks(draws, [str(count) for count in draws])
    ax.minorticks_off()
    ax.set_xlabel("draws per gradient step")
    percent(ax, "y")
    label_ends(ax, names, draws[-1], [y for _, y in ends.values()], cycle(len(names)))
    budgets = sorted({round(row["gradients"] / row["num_examples"]) for row in rows})
    equal = (
        str(budgets[0]) if budgets[-1] <= 1.1 * budgets[0] else f"{budgets[0]} to {budgets[-1]}, not equal"
    )
    heading(ax, "Robust accuracy and draws per step", f"gradients per image: {equal}; 95 % intervals")
    return ax


MANY = 20
"""From this many points on, intervals are drawn as one band."""


def _draw_bands(ax: Any, curve: RobustnessCurve) -> dict[str, tuple[float, float]]:
    """Posterior bands; returns where each line ends."""
    ends = {}
    for name, color in zip(curve.defenses, cycle(len(curve.defenses)), strict=True):
        low, middle, high = curve.band(name)
        ax.fill_between(curve.eps, low, high, color=color, alpha=0.18, linewidth=0)
        ax.plot(curve.eps, middle, color=color, linewidth=2)
        ax.plot(*curve.observed[name], "o", color=color, markersize=4.5, clip_on=False)
        ends[name] = (float(curve.eps[-1]), float(middle[-1]))
    return ends


def _draw_rows(ax: Any, rows: Sequence[Row], name: str, color: str) -> tuple[float, float]:
    """Accuracies with intervals over one entry of the rows; returns where the line ends."""
    x, y, low, high = ([row[key] for row in rows] for key in (name, "accuracy", "low", "high"))
    if len(rows) >= MANY:
        ax.fill_between(x, low, high, step="post", color=color, alpha=0.18, linewidth=0)
        ax.step(x, y, where="post", color=color, linewidth=2)
    else:
        ax.vlines(x, low, high, color=color, linewidth=2, alpha=0.4, clip_on=False)
        ax.plot(x, y, "o-", color=color, markersize=5, linewidth=1.5, clip_on=False)
    return float(x[-1]), float(y[-1])


def rule_of(report: Report, rule: str | None) -> str:
    """The rule that was asked for, or the first of the report.

    Raises:
        TypeError: no report.
        ValueError: a report without rows, or no such rule.
    """
    known = [row["rule"] for row in check_report(report).rows]
    check_member("rule", known[0] if rule is None else rule, set(known))
    return known[0] if rule is None else rule


def _attack_of(report: Report, attack: str | None) -> str:
    """The attack that was asked for, or the last that every defense was under."""
    if attack is not None:
        check_member("attack", attack, {row["attack"] for row in report.rows})
        return attack
    if not shared_attacks(report):
        raise ValueError(
            "expected an attack that every defense of the report was under, found none; name one by attack="
        )
    return shared_attacks(report)[-1]


def shared_attacks(report: Report) -> list[str]:
    """The attacks that every defense was under; the worst case, where there is one, comes last."""
    found = [{r["attack"] for r in report.rows if r["defense"] == name} for name in report.defenses]
    names = dict.fromkeys(row["attack"] for row in report.rows if row["attack"] != "clean")
    return sorted(set.intersection(*found) & set(names), key=[*names].index)


def norm_name(of: Report | float) -> str:
    """How a norm, or that of a report, is written."""
    norm = of.settings.get("norm", "inf") if isinstance(of, Report) else of
    return "l-inf" if float(norm) == math.inf else f"L{float(norm):g}"


def _percent_and_interval(row: Row) -> str:
    return f"{100 * row['accuracy']:.0f}  [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"
