"""``report.html``: one file that says the verdict first, and shows what it rests on.

Nothing is fetched: style and pictures are inside. It fits a phone and follows the reader's choice of
light or dark.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import metadata, resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import probdefense
from probdefense.analysis.drawings import Row as Images
from probdefense.analysis.drawings import attacked_row, inline_svg
from probdefense.analysis.pictures import image_grid
from probdefense.analysis.plots import accuracy_chart, norm_name, robustness_curves, shared_attacks
from probdefense.analysis.sections import (
    accuracies,
    certified,
    checked,
    compared,
    radius_of,
    ranked,
    spent,
    strongest,
)
from probdefense.analysis.style import COLORS, MUTED
from probdefense.checks.results import Check, Checks, unapplied
from probdefense.evaluation.certification import Certificate
from probdefense.evaluation.comparison import Comparison, compare_all
from probdefense.evaluation.exports import Exports
from probdefense.evaluation.report import Report, Row, check_report
from probdefense.files import whole
from probdefense.tables import listed
from probdefense.types import Inputs
from probdefense.validation import check_kind, check_member

DARK = ("#56a8e0", "#f28a4b", "#3cc49a", "#e0a2c4", "#f0b84a", "#8fcbf0", "#c2a063")
"""`COLORS` on a dark page, in the same order."""


CAN = "They could show that the number is too high, not that it is good."
"""What checks are able to say."""


WORDS = {
    "num_samples": "draws behind every verdict",
    "num_examples": "test images used",
    "images": "test images asked for",
    "adaptive_images": "test images for a defense that adapts",
    "gradients": "gradients per image and attack",
    "suite_budget": "evaluations per image of the suite",
    "checked": "test images for checks",
    "check_gradients": "gradients per image and check",
    "votes": "votes per certificate",
}
"""Settings whose names alone do not tell them apart."""


class Verdict(NamedTuple):
    """One sentence about a defense, beside its number, and why."""

    defense: str
    number: str
    sentence: str
    why: str
    checked: str
    doubt: str


def write_html(
    report: Report,
    folder: str | os.PathLike[str],
    *,
    images: Mapping[str, Sequence[Any]] | Sequence[Any] | None = None,
    figures: Mapping[str, Any] | None = None,
    checks: Mapping[str, Iterable[Check]] | Checks | None = None,
    certificate: Mapping[str, Sequence[Row] | Certificate] | Certificate | None = None,
    comparison: Comparison | None = None,
) -> Path:
    """Writes ``report.html`` into a folder, made if needed; other files stay.

    `Report.to_html` does the same and compares the defenses itself.

    Args:
        report: One or several defenses.
        folder: Where to; a path that ends in ``.html`` is the file itself.
        images: By caption, clean and attacked images ``(x, x_adv)``, each ``(batch, channels, height,
            width)``; or ``(x, x_adv, y, before, after)`` with two `Prediction`, and then labels and
            probabilities before and after the attack are shown. Or one of both, without a caption.
        figures: By caption, further matplotlib figures or axes.
        checks: From `checks.run`, of the one defense or by defense.
        certificate: A `Certificate`, or rows of its ``curve``, of the one defense or by defense.
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
    check_kind("folder", folder, (str, os.PathLike), "give a folder, or a file that ends in .html")
    if comparison is not None:
        check_kind("comparison", comparison, Comparison, "probdefense.compare_all(report) makes one")
    check_kind("figures", {} if figures is None else figures, Mapping, "give figures by their captions")
    report, by_name = ranked(report), _by_name(report, checks, Checks, "checks")
    certificates = _by_name(report, certificate, Certificate, "certificate")
    details = [
        *compared(comparison, report),
        certified(certificates, report),
        checked(by_name, report, fired=True),
        checked(by_name, report, fired=False),
        spent(report),
    ]
    given = images if isinstance(images, Mapping) else {"": images} if images is not None else {}
    for each in given.values():
        check_kind("images", each, (list, tuple), "give (x, x_adv), or such pairs by caption")
    pairs = {caption: each for caption, each in given.items() if len(each) == 2}
    drawn = _figures(report, pairs, figures or {})
    template = resources.files("probdefense.analysis").joinpath("report.html.j2").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        about=_about(report),
        verdicts=[
            _verdict(report, strongest(report, name), by_name.get(name, [])) for name in report.defenses
        ],
        accuracy=accuracies(report),
        images=[_labeled(caption, each) for caption, each in given.items() if len(each) != 2],
        tables=[table for table in details if table is not None],
        figures=[{"svg": _svg(figure, n, text), "caption": text} for n, (text, figure) in enumerate(drawn)],
        settings=_settings(report),
        colors=[{"light": light, "dark": dark} for light, dark in zip(COLORS, DARK, strict=True)],
    )
    path = Path(folder) if Path(folder).suffix == ".html" else Path(folder) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as place:
        place.write_text(page, encoding="utf-8")
    return path


def pairs_of(report: Exports) -> Comparison | None:
    """Every pair of the defenses of a report, where they saw the same examples."""
    arrays = report.arrays
    seen = [arrays.examples(name) for name in report.defenses]
    known = all(arrays.key("correct", *(row[n] for n in NAMES)) in arrays for row in report.rows)
    if len(seen) < 2 or not known or not isinstance(report, Report):
        return None
    same = len(seen[0]) > 0 and all(np.array_equal(each, seen[0]) for each in seen)
    return compare_all(ranked(report), rule=report.rows[0]["rule"]) if same else None


NAMES = ("defense", "attack", "eps", "rule")


def _by_name(report: Report, given: Any, kind: type, name: str) -> dict[str, Any]:
    """Results by defense; one alone is that of the one defense.

    Raises:
        TypeError: neither results of the class nor a list of what they consist of.
        ValueError: one for several defenses, or of a defense that is not in the report.
    """
    if not isinstance(given, kind):
        way = f"give one {kind.__name__}, or a dict of them by the names of the defenses"
        check_kind(name, {} if given is None else given, Mapping, way)
        for each in given or {}:
            check_member("defense", each, report.defenses)
            check_kind(f"{name} of {each!r}", given[each], (kind, list, tuple), way)
        return {each: given[each] for each in report.defenses if each in (given or {})}
    if len(report.defenses) != 1:
        raise ValueError(
            f"expected {name} by defense, got one for {len(report.defenses)} defenses; give a dict of them"
        )
    return {report.defenses[0]: given}


def _labeled(caption: str, given: Sequence[Any]) -> Images:
    """Images with what was answered before and after.

    Raises:
        ValueError: not five things.
    """
    if len(given) != 5:
        raise ValueError(
            f"expected images as (x, x_adv) or (x, x_adv, y, before, after), got {len(given)} things; before "
            "and after are predictions"
        )
    x, x_adv, y, before, after = given
    return attacked_row(caption, x, x_adv, y, before, after)


def _about(report: Report) -> str:
    row, asked = report.rows[0], report.settings
    data = f"{asked['data']}, " if "data" in asked else ""
    norm = norm_name(report)
    return (
        f"{data}{norm} radius {radius_of(report):g}, {row['num_examples']} images; rule {row['rule']}, "
        f"{asked.get('num_samples', 1)} draws; 95 % intervals for the {asked.get('estimand', 'population')}"
    )


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
    known = list(checks)
    ran = [check for check in known if check.verdict not in ("not applicable", "cannot tell")]
    fired = [f"{check.name} ({check.verdict})" for check in ran if check.fired]
    quiet = _quiet(len(ran), known) if ran and not fired else ""
    doubt = f"Not to be trusted yet: {', '.join(fired)}." if fired else ""
    number = f"{100 * row['accuracy']:.0f}\N{NO-BREAK SPACE}%"
    return Verdict(name, number, sentence + ".", _why(report, row), quiet, doubt)


def _quiet(ran: int, checks: list[Check]) -> str:
    """What checks say of which none fired."""
    unsure = sum(check.verdict == "cannot tell" for check in checks)
    said = [f"{ran} checks found nothing wrong", f"{unsure} cannot tell" if unsure else "", unapplied(checks)]
    return f"{', '.join(filter(None, said))}. {CAN}"


def _why(report: Report, judged: Row) -> str:
    """What each attack leaves at the radius of the verdict, the strongest first."""
    found = [
        row
        for row in report.rows
        if (row["defense"], row["rule"], row["eps"]) == (judged["defense"], judged["rule"], judged["eps"])
        and row["attack"] not in ("clean", "worst")
    ]
    if len(found) < 2:
        return ""
    by_rest: dict[str, list[str]] = {}
    for row in sorted(found, key=lambda row: row["accuracy"]):
        by_rest.setdefault(f"{100 * row['accuracy']:.0f}\N{NO-BREAK SPACE}%", []).append(row["attack"])
    left = [
        f"{listed(names)} {'each leave' if len(names) > 1 else 'leaves'} {rest}"
        for rest, names in by_rest.items()
    ]
    first = f"Strongest attack{'s' * (len(next(iter(by_rest.values()))) > 1)}: {left[0]}"
    return f"{first}; then {', '.join(left[1:4])}." if left[1:] else f"{first}."


def _settings(report: Report) -> list[tuple[str, str]]:
    """What was asked for and used, in words; what is said twice or says nothing is left out."""
    versions = report.settings.get("versions") or {
        "probdefense": probdefense.__version__,
        **{name: metadata.version(name) for name in ("torch", "pyro-ppl")},
    }
    asked = {name: value for name, value in report.settings.items() if name not in ("versions", *versions)}
    if asked.get("images") == asked.get("num_examples"):
        asked.pop("images", None)
    kept = [(name, value) for name, value in (asked | versions).items() if value is not None]
    return [(WORDS.get(name, str(name)), _plain(value)) for name, value in kept]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_plain(each)}" for name, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _figures(
    report: Report, images: Mapping[str, Sequence[Inputs]], figures: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """Captions and figures: the chart, curves over several radii, images, and what the caller brings."""
    drawn: list[tuple[str, Any]] = [("", accuracy_chart(report).figure)]
    if len({row["eps"] for row in report.rows}) > 2 and shared_attacks(report):
        drawn.append(("", robustness_curves(report).figure))
    drawn += [(caption, image_grid(*pair)[0, 0].figure) for caption, pair in images.items()]
    for caption, figure in figures.items():
        if not hasattr(getattr(figure, "figure", figure), "savefig"):
            raise TypeError(
                f"expected matplotlib figures or axes, got {type(figure).__name__} for {caption!r}; "
                "analysis.plots makes some"
            )
    return drawn + [(caption, getattr(figure, "figure", figure)) for caption, figure in figures.items()]


def _svg(figure: Any, number: int, caption: str) -> str:
    """A figure as inline SVG with the page's colors, and a name for those who cannot see it."""
    axes = figure.axes[0] if figure.axes else None
    title = caption or (axes.get_title(loc="left") if axes is not None else "") or "figure"
    svg = inline_svg(figure, f"figure{number}")
    for k, color in enumerate(COLORS):
        svg = re.sub(color, f"var(--c{k})", svg, flags=re.IGNORECASE)
    svg = svg.replace(MUTED, "var(--muted)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
