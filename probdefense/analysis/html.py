"""``report.html``: one file that says the verdict first, and shows what it rests on.

Nothing is fetched: style and pictures are inside. It fits a phone and follows the reader's choice of
light or dark.
"""

import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any, NamedTuple

import probdefense
from probdefense.analysis.pictures import image_grid
from probdefense.analysis.plots import accuracy_chart, norm_name, robustness_curves, shared_attacks
from probdefense.analysis.style import COLORS, MUTED
from probdefense.checks.results import Check
from probdefense.evaluation.comparison import Comparison
from probdefense.evaluation.report import Report, Row, check_report
from probdefense.files import whole
from probdefense.types import Inputs
from probdefense.validation import check_kind

DARK = ("#56a8e0", "#f28a4b", "#3cc49a", "#e0a2c4", "#f0b84a", "#8fcbf0", "#c2a063")
"""`COLORS` on a dark page, in the same order."""


class Verdict(NamedTuple):
    """One sentence about a defense, beside its number."""

    defense: str
    number: str
    sentence: str
    checked: str
    doubt: str


class Cell(NamedTuple):
    """What stands in a table, large and small."""

    text: str
    small: str = ""
    wide: bool = False


class Table(NamedTuple):
    """A table of the page."""

    title: str
    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    folded: bool = False


def write_html(
    report: Report,
    folder: str | os.PathLike[str],
    *,
    images: Mapping[str, tuple[Inputs, Inputs]] | None = None,
    figures: Mapping[str, Any] | None = None,
    checks: Mapping[str, Iterable[Check]] | None = None,
    certificate: Mapping[str, Sequence[Row]] | None = None,
    comparison: Comparison | None = None,
) -> Path:
    """Writes ``report.html`` into a folder, made if needed; other files stay.

    Args:
        report: One or several defenses.
        folder: Where to.
        images: By caption, clean and attacked images ``(batch, channels, height, width)``.
        figures: By caption, further matplotlib figures or axes.
        checks: By defense, from `checks.run`.
        certificate: By defense, rows of ``Certificate.curve``.
        comparison: From `compare`.

    Returns:
        The path of the file.

    Examples:
        >>> import tempfile
        >>> import probdefense as pd
        >>> net, data = pd.deterministic(torch.nn.Linear(4, 3)), (torch.rand(8, 4), torch.zeros(8).long())
        >>> write_html(pd.evaluate(net, data, {"fgsm": pd.attacks.fgsm}), tempfile.mkdtemp()).name
        'report.html'
    """
    import jinja2

    check_report(report)
    check_kind("folder", folder, (str, os.PathLike), "give the path of a folder")
    checks = checks or {}
    details = (
        _checked(checks, fired=True),
        _checked(checks, fired=False),
        _compared(comparison),
        _certified(certificate),
        _spent(report),
    )
    drawn = _figures(report, images or {}, figures or {})
    template = resources.files("probdefense.analysis").joinpath("report.html.j2").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        about=_about(report),
        verdicts=_verdicts(report, checks),
        accuracy=_accuracies(report),
        tables=[table for table in details if table is not None],
        figures=[{"svg": _svg(figure, n), "caption": text} for n, (text, figure) in enumerate(drawn)],
        settings=_settings(report),
        colors=[{"light": light, "dark": dark} for light, dark in zip(COLORS, DARK, strict=True)],
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "report.html") as place:
        place.write_text(page, encoding="utf-8")
    return folder / "report.html"


def _about(report: Report) -> str:
    row, asked = report.rows[0], report.settings
    data = f"{asked['data']}, " if "data" in asked else ""
    norm = norm_name(report)
    return (
        f"{data}{norm} radius {_reach(report):g}, {row['num_examples']} images; rule {row['rule']}, "
        f"{asked.get('num_samples', 1)} draws; 95 % intervals for the {asked.get('estimand', 'population')}"
    )


def _verdicts(report: Report, checks: Mapping[str, Iterable[Check]]) -> list[Verdict]:
    """One per defense, the most robust first."""
    strongest = {name: _strongest(report, name) for name in report.defenses}
    order = sorted(strongest, key=lambda name: -strongest[name]["accuracy"])
    return [_verdict(report, strongest[name], checks.get(name, [])) for name in order]


def _verdict(report: Report, row: Row, checks: Iterable[Check]) -> Verdict:
    name = row["defense"]
    clean = report.row(defense=name, attack="clean", rule=row["rule"])
    attacks = {r["attack"] for r in report.rows if r["defense"] == name} - {"clean", "worst"}
    under = {
        "clean": "on clean images; nothing attacked it",
        "worst": f"under the worst of {len(attacks)} attacks",
    }
    sentence = (
        f"is right on {100 * row['low']:.0f} to {100 * row['high']:.0f}\N{NO-BREAK SPACE}% of images "
        f"{under.get(row['attack'], 'under ' + row['attack'])}"
    )
    if row["attack"] != "clean":
        sentence += (
            f" at {norm_name(report)} radius {row['eps']:g}; "
            f"{100 * clean['accuracy']:.0f}\N{NO-BREAK SPACE}% on clean ones"
        )
    ran = [check for check in checks if check.verdict != "not applicable"]
    fired = [f"{check.name} ({check.verdict})" for check in ran if check.fired]
    checked = f"{len(ran)} checks found nothing wrong." if ran and not fired else ""
    doubt = f"Not to be trusted yet: {', '.join(fired)}." if fired else ""
    return Verdict(name, f"{100 * row['accuracy']:.0f}\N{NO-BREAK SPACE}%", sentence + ".", checked, doubt)


def _strongest(report: Report, defense: str) -> Row:
    """The row by which a defense is judged: the worst case by the first rule at the largest radius."""
    rule = report.rows[0]["rule"]
    rows = [r for r in report.rows if r["defense"] == defense and r["rule"] == rule]
    attacked = [r for r in rows if r["attack"] != "clean" and r["eps"] == _reach(report)]
    worst = [r for r in attacked if r["attack"] == "worst"]
    return min(worst or attacked or rows, key=lambda row: row["accuracy"])


def _accuracies(report: Report) -> Table:
    places = list(dict.fromkeys((row["attack"], row["eps"]) for row in report.rows))
    places.sort(key=lambda place: (place[1] > 0, -place[1], place[0] != "worst"))
    several = len({eps for _, eps in places if eps > 0}) > 1
    columns = [f"{attack} {eps:g}" if several and eps > 0 else attack for attack, eps in places]
    lines: dict[tuple[str, str], dict[tuple[str, float], Row]] = {}
    for row in report.rows:
        lines.setdefault((row["defense"], row["rule"]), {})[row["attack"], row["eps"]] = row
    rows = [
        [Cell(defense), Cell(rule), *(_share(found.get(place)) for place in places)]
        for (defense, rule), found in lines.items()
    ]
    return Table("Accuracy", "In %, with 95 % intervals.", ["defense", "rule", *columns], rows)


def _spent(report: Report) -> Table | None:
    rule, reach = report.rows[0]["rule"], _reach(report)
    rows = [
        [
            Cell(row["defense"]),
            Cell(row["attack"]),
            Cell(str(row["attack_samples"])),
            Cell(f"{row['gradients'] / row['num_examples']:.0f}"),
            Cell(f"{row['queries'] / row['num_examples']:.0f}"),
        ]
        for row in report.rows
        if (row["rule"], row["eps"]) == (rule, reach) and row.get("attack_samples") is not None
    ]
    columns = ["defense", "attack", "draws per call", "gradients", "queries"]
    about = f"Per image at radius {reach:g}; gradients and queries count every draw."
    return Table("What the attacks spent", about, columns, rows) if rows else None


def _compared(comparison: Comparison | None) -> Table | None:
    if comparison is None:
        return None
    reach = max(row["eps"] for row in comparison.rows)
    shown = [row for row in comparison.rows if row["eps"] in (0.0, reach)]
    kept = [row for row in shown if row["attack"] in ("clean", "worst")] or shown
    rows = [
        [
            Cell(f"{row['a']} - {row['b']}"),
            Cell(f"{row['attack']} {row['eps']:g}" if row["eps"] else row["attack"], row["rule"]),
            Cell(f"{100 * row['difference']:+.1f}", f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]"),
            Cell(f"{row['probability']:.3f}"),
            Cell(f"{row['p_holm']:.3f}" if row["p_holm"] >= 0.001 else "< 0.001"),
        ]
        for row in kept
    ]
    columns = ["pair", "attack", "difference", "P(first is better)", "p (Holm)"]
    return Table("Pairs", f"Percentage points; {comparison.scope}.", columns, rows)


def _checked(checks: Mapping[str, Iterable[Check]], fired: bool) -> Table | None:
    """The checks that fired, or the others."""
    rows = [
        [Cell(name), Cell(check.name), Cell(check.verdict), Cell(_evidence(check), wide=True)]
        for name, found in checks.items()
        for check in found
        if check.fired == fired
    ]
    title = "Is it robust, or just noisy?" if fired else f"{len(rows)} checks that did not fire"
    columns = ["defense", "check", "verdict", "evidence"]
    return Table(title, "", columns, rows, folded=not fired) if rows else None


def _evidence(check: Check) -> str:
    numbers = ", ".join(f"{name} {value:.3g}" for name, value in check.evidence.items())
    return f"{check.advice} ({numbers})" if check.fired else numbers


def _certified(certificate: Mapping[str, Sequence[Row]] | None) -> Table | None:
    if not certificate:
        return None
    radii = sorted({row["eps"] for rows in certificate.values() for row in rows})
    lines = []
    for name, rows in certificate.items():
        by_radius = {row["eps"]: row for row in rows}
        lines.append([Cell(name), *(_share(by_radius.get(radius)) for radius in radii)])
    about = "In %, with 95 % intervals: right, and the infinite vote is the same up to the L2 radius."
    return Table("Certified accuracy", about, ["defense", *(f"{radius:.3g}" for radius in radii)], lines)


def _share(row: Row | None) -> Cell:
    if row is None:
        return Cell("-")
    return Cell(f"{100 * row['accuracy']:.1f}", f"[{100 * row['low']:.0f}, {100 * row['high']:.0f}]")


def _settings(report: Report) -> list[tuple[str, str]]:
    asked = {name: value for name, value in report.settings.items() if name != "versions"}
    versions = report.settings.get("versions") or {
        "probdefense": probdefense.__version__,
        **{name: metadata.version(name) for name in ("torch", "pyro-ppl")},
    }
    return [(str(name), _plain(value)) for name, value in [*asked.items(), *versions.items()]]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_plain(each)}" for name, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _reach(report: Report) -> float:
    return max(row["eps"] for row in report.rows)


def _figures(
    report: Report, images: Mapping[str, tuple[Inputs, Inputs]], figures: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """Captions and figures: the chart, curves over several radii, images, and what the caller brings."""
    drawn: list[tuple[str, Any]] = [("", accuracy_chart(report).figure)]
    if len({row["eps"] for row in report.rows}) > 2 and shared_attacks(report):
        drawn.append(("", robustness_curves(report).figure))
    drawn += [(caption, image_grid(*pair)[0, 0].figure) for caption, pair in images.items()]
    return drawn + [(caption, getattr(figure, "figure", figure)) for caption, figure in figures.items()]


def _svg(figure: Any, number: int) -> str:
    """A figure as inline SVG: ids of its own, the page's colors, and as wide as the page."""
    from matplotlib import pyplot, rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "probdefense"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(figure)
    svg = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>figure{number}-", svg)
    for k, color in enumerate(COLORS):
        svg = re.sub(color, f"var(--c{k})", svg, flags=re.IGNORECASE)
    return svg.replace(MUTED, "var(--muted)")
