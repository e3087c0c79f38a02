"""What a report says in tables: cells, bars, and a sentence on what they mean."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from probdefense.analysis.plots import norm_name
from probdefense.checks.results import Check, unapplied
from probdefense.evaluation.certification import Certificate, out_of_reach
from probdefense.evaluation.comparison import Comparison
from probdefense.evaluation.exports import per_image, told_apart
from probdefense.evaluation.report import Report, Row
from probdefense.tables import chance, listed, points

LEVEL = 0.05
"""Below this adjusted p-value two defenses are told apart."""

MANY = 12
"""Of more pairs, those with the best defense are drawn and all are folded."""


class Bar(NamedTuple):
    """An interval on a track, in percent of its width; `at` is the value, `zero` means no difference."""

    low: float
    high: float
    at: float
    zero: float
    clear: bool


class Cell(NamedTuple):
    """What stands in a table, large and small, or a bar."""

    text: str
    small: str = ""
    wide: bool = False
    bar: Bar | None = None


class Table(NamedTuple):
    """A table of the page; one without a title goes on under the one before."""

    title: str
    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    folded: bool = False


def radius_of(report: Report) -> float:
    """The largest radius, by which defenses are judged."""
    return max(row["eps"] for row in report.rows)


def strongest(report: Report, defense: str) -> Row:
    """The row by which a defense is judged: the worst case by the first rule at the largest radius."""
    rule = report.rows[0]["rule"]
    rows = [r for r in report.rows if r["defense"] == defense and r["rule"] == rule]
    attacked = [r for r in rows if r["attack"] != "clean" and r["eps"] == radius_of(report)]
    worst = [r for r in attacked if r["attack"] == "worst"]
    return min(worst or attacked or rows, key=lambda row: row["accuracy"])


def ranked(report: Report) -> Report:
    """The report with the most robust defense first: the order everywhere on the page."""
    judged = {name: strongest(report, name)["accuracy"] for name in report.defenses}
    order = sorted(judged, key=lambda name: -judged[name])
    rows = sorted(report.rows, key=lambda row: order.index(row["defense"]))
    return replace(report, rows=rows)


def accuracies(report: Report) -> Table:
    """Every accuracy with its interval: a line per defense and rule, a column per attack and radius."""
    places = columns_of(report)
    lines: dict[tuple[str, str], dict[tuple[str, float], Row]] = {}
    for row in told_apart(report.rows):
        lines.setdefault((row["defense"], row["rule"]), {})[row["attack"], row["eps"]] = row
    rows = [
        [Cell(defense), Cell(rule), *(share(found.get(place)) for place in places)]
        for (defense, rule), found in lines.items()
    ]
    about = f"In %, with 95 % intervals. {by_chance(report)}".strip()
    return Table("Accuracy", about, ["defense", "rule", *places.values()], rows)


def by_chance(report: Report) -> str:
    """What to say where the worst case lies above one of its attacks; else empty."""
    least: dict[tuple[Any, ...], float] = {}
    for row in report.rows:
        if row["attack"] not in ("clean", "worst"):
            place = row["defense"], row["rule"], row["eps"]
            least[place] = min(row["accuracy"], least.get(place, 1.0))
    worst = [row for row in report.rows if row["attack"] == "worst"]
    if not any(row["accuracy"] > least.get((row["defense"], row["rule"], row["eps"]), 1.0) for row in worst):
        return ""
    return (
        "The worst case may lie above a single attack by chance: which point is the hardest of an image is "
        "decided on other draws than the verdict."
    )


def columns_of(report: Report) -> dict[tuple[str, float], str]:
    """The columns of a table by attack and radius: clean, then the worst case, the largest radius first."""
    places = list(dict.fromkeys((row["attack"], row["eps"]) for row in report.rows))
    places.sort(key=lambda place: (place[1] > 0, -place[1], place[0] != "worst"))
    several = len({eps for _, eps in places if eps > 0}) > 1
    return {(name, eps): f"{name} {eps:g}" if several and eps > 0 else name for name, eps in places}


def spent(report: Report) -> Table | None:
    """What the attacks cost per image."""
    rule, reach = report.rows[0]["rule"], radius_of(report)
    rows = [
        [
            Cell(row["defense"]),
            Cell(row["attack"]),
            Cell(str(row["attack_samples"])),
            Cell(str(row["gradients/image"])),
            Cell(str(row["queries/image"])),
        ]
        for row in per_image(report.rows)
        if (row["rule"], row["eps"]) == (rule, reach) and row.get("attack_samples") is not None
    ]
    columns = ["defense", "attack", "draws per call", "gradients", "queries"]
    about = f"Per image at radius {reach:g}; gradients and queries count every draw."
    return Table("What the attacks spent", about, columns, rows, folded=True) if rows else None


def unequal(report: Report) -> str:
    """What to say where the worst case is not of the same attacks for every defense; else empty."""
    reach = radius_of(report)
    ran: dict[str, list[str]] = {name: [] for name in report.defenses}
    for row in report.rows:
        if row["eps"] == reach and row["attack"] not in ("clean", "worst", *ran[row["defense"]]):
            ran[row["defense"]].append(row["attack"])
    if len({frozenset(names) for names in ran.values()}) == 1:
        return ""
    told = "; ".join(f"{name} {listed(names) if names else 'none'}" for name, names in ran.items())
    return f"the worst case is not of the same attacks ({told}), so it does not compare the defenses"


def compared(comparison: Comparison | None, report: Report) -> list[Table]:
    """Differences as bars, under the worst case and on clean images apart; all of many are folded.

    The first of a pair is the one that stands first in the report, so that pairs follow the page.
    """
    if comparison is None:
        return []
    reach = max(row["eps"] for row in comparison.rows)
    shown = in_order([row for row in comparison.rows if row["eps"] in (0.0, reach)], report.defenses)
    several = {(row["a"], row["b"]) for row in shown if row["attack"] == "worst"}
    kept = [r for r in shown if r["attack"] in ("clean", "worst") or (r["a"], r["b"]) not in several]
    groups = [[r for r in kept if r["attack"] != "clean"], [r for r in kept if r["attack"] == "clean"]]
    caption = (
        f"Percentage points; {comparison.scope}. A gray line is no difference that these images and draws "
        f"can show: it crosses the middle, or had to be clearer among so many pairs (p above {LEVEL:g})."
    )
    caption += f" Beware: {note}." if (note := unequal(report)) else ""
    tables: list[Table] = []
    for group in filter(None, groups):
        few = group if len(group) <= MANY else _with_best(group)
        title = "Pairs" if not tables else ""
        tables.append(_pairs(few, title, caption if title else "", folded=False))
    if any(len(group) > MANY for group in groups):
        tables.append(
            _pairs([row for group in groups for row in group], f"All {len(kept)} pairs", "", folded=True)
        )
    return tables


def in_order(rows: list[Row], order: Sequence[str]) -> list[Row]:
    """Pairs as the names stand in `order`; names that do not stand there last, as they come."""
    place = {name: number for number, name in enumerate(order)}

    def places(row: Row) -> tuple[int, ...]:
        return tuple(place.get(row[side], len(place)) for side in "ab")

    turned = [_turned(row) if places(row)[0] > places(row)[1] else row for row in rows]
    return sorted(turned, key=places)


def _turned(row: Row) -> Row:
    """The same comparison seen from the other side."""
    return row | {
        "a": row["b"],
        "b": row["a"],
        "accuracy_a": row["accuracy_b"],
        "accuracy_b": row["accuracy_a"],
        "difference": -row["difference"],
        "low": -row["high"],
        "high": -row["low"],
        "probability": 1 - row["probability"],
    }


def _with_best(rows: list[Row]) -> list[Row]:
    accuracy = {row[side]: row[f"accuracy_{side}"] for row in rows for side in "ab"}
    best = max(accuracy, key=lambda name: accuracy[name])
    return [row for row in rows if best in (row["a"], row["b"])]


def _pairs(rows: list[Row], title: str, caption: str, folded: bool) -> Table:
    reach = max(0.01, *(max(abs(row["low"]), abs(row["high"])) for row in rows))
    lines = [
        [
            Cell(f"{row['a']} - {row['b']}"),
            Cell("", bar=_bar(row, reach)),
            Cell(f"{row['attack']} {row['eps']:g}" if row["eps"] else row["attack"], row["rule"]),
            Cell(points(row["difference"]), f"[{100 * row['low']:z.1f}, {100 * row['high']:z.1f}]"),
            Cell(chance(row["probability"])),
            Cell(chance(row["p_holm"])),
        ]
        for row in rows
    ]
    columns = ["pair", f"\N{MINUS SIGN}{100 * reach:.0f} to +{100 * reach:.0f}", "attack", "difference"]
    return Table(title, caption, [*columns, "P(first is better)", "p (Holm)"], lines, folded)


def _bar(row: Row, reach: float) -> Bar:
    low, high, at = (50 + 50 * row[name] / reach for name in ("low", "high", "difference"))
    return Bar(low, high, at, 50.0, row["p_holm"] < LEVEL)


def of_first(report: Report) -> str:
    """What to say of checks and certificates, which are those of one training of several."""
    return "of the first training seed" if report.rows[0].get("num_seeds") else ""


def checked(checks: Mapping[str, Iterable[Check]], report: Report, fired: bool) -> Table | None:
    """The checks that fired or cannot tell, or the others."""
    shown = [
        (name, check)
        for name, found in checks.items()
        for check in found
        if (check.fired or check.verdict == "cannot tell") == fired
    ]
    rows = [
        [Cell(name), Cell(check.name), Cell(check.verdict), Cell(_evidence(check), wide=True)]
        for name, check in shown
    ]
    title = "Is it robust, or just noisy?" if fired else _unfired([check for _, check in shown])
    about = (
        "A check that fires shows that a number is too good to be true."
        if fired
        else "A check can show that a number is too good to be true. That none fires does not show that it "
        "is true, nor that it is high."
    )
    about += f" They are {seed}." if (seed := of_first(report)) else ""
    columns = ["defense", "check", "verdict", "evidence"]
    return Table(title, about, columns, rows, folded=not fired) if rows else None


def _unfired(checks: list[Check]) -> str:
    """How many checks found nothing wrong, of those that did not fire."""
    quiet, skip = sum(check.verdict == "ok" for check in checks), unapplied(checks)
    title = f"{len(checks)} checks that did not fire"
    return f"{title}: {quiet} found nothing wrong, {skip}" if skip else title


def _evidence(check: Check) -> str:
    numbers = ", ".join(f"{name} {value:.3g}" for name, value in check.evidence.items())
    return f"{check.advice} ({numbers})" if check.fired else numbers or check.advice


def certified(certificate: Mapping[str, Any], report: Report) -> Table | None:
    """Certified accuracy at radii, beside what their norm means."""
    if not certificate:
        return None
    found = {name: _curve(report, name, each) for name, each in certificate.items()}
    radii = sorted({row["eps"] for rows in found.values() for row in rows})
    lines = []
    for name, rows in found.items():
        by_radius = {row["eps"]: row for row in rows}
        lines.append([Cell(name), *(share(by_radius.get(radius)) for radius in radii)])
    about = "In %, with 95 % intervals: right, and the infinite vote is the same up to the radius."
    about += f" They are {seed}." if (seed := of_first(report)) else ""
    about += f" {_meaning(report, {each.norm for each in certificate.values() if hasattr(each, 'norm')})}"
    notes: dict[str, list[str]] = {}
    for name, rows in found.items():
        notes.setdefault(out_of_reach(rows), []).append(name)
    about += "".join(f" {listed(names)}: {note}." for note, names in notes.items() if note)
    return Table("Certified accuracy", about, ["defense", *(f"{radius:.3g}" for radius in radii)], lines)


def _curve(report: Report, name: str, certificate: Any) -> Sequence[Row]:
    """Rows as they are; those of a `Certificate` with the labels of the report, of its first examples.

    Raises:
        ValueError: more certificates than examples, or no such defense.
    """
    if not isinstance(certificate, Certificate):
        return certificate
    labels = report.arrays.get(report.arrays.key("labels", name))
    count = len(certificate.label)
    if labels is None or len(labels) < count:
        raise ValueError(
            f"expected a certificate of the first images of {name!r} in the report, got {count} images; name "
            "it as the report does, or give rows of its curve(y, radii)"
        )
    y = certificate.label.new_tensor(labels[:count])
    steps = [step * certificate.sigma for step in (0.0, 0.5, 1.0, 1.5, 2.0)]
    return certificate.curve(y, steps)


def _meaning(report: Report, norms: set[float]) -> str:
    """How far the radius of the report reaches in the norm of a usual certificate; others are named."""
    eps, pixels = radius_of(report), report.settings.get("pixels")
    if norms - {2.0}:
        names = listed([norm_name(norm) for norm in sorted(norms)])
        return f"Radii are {names}, those of the attacks {norm_name(report)}."
    if norm_name(report) != "l-inf" or not pixels or not eps:
        return (
            "Radii are L2 unless the certificate says otherwise, those of the attacks "
            + norm_name(report)
            + "."
        )
    return (
        f"Radii are L2, the length of the whole change. The attacks above move each of {pixels} pixels by up "
        f"to {eps:g}, an L2 length of up to {eps * float(pixels) ** 0.5:.2g}: a certificate at L2 {eps:g} "
        "says nothing about them."
    )


def share(row: Row | None) -> Cell:
    """An accuracy with its interval, in percent."""
    if row is None:
        return Cell("-")
    return Cell(f"{100 * row['accuracy']:.1f}", f"[{100 * row['low']:.0f}, {100 * row['high']:.0f}]")
