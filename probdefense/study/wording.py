"""What the command says of a result, as lines that fit a width: a short summary, or all of it."""

import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from probdefense.analysis.plots import norm_name
from probdefense.analysis.sections import (
    LEVEL,
    by_chance,
    columns_of,
    in_order,
    of_first,
    radius_of,
    ranked,
    unequal,
)
from probdefense.checks.results import Checks, unapplied
from probdefense.evaluation.certification import out_of_reach
from probdefense.evaluation.comparison import Comparison
from probdefense.evaluation.exports import told_apart
from probdefense.evaluation.report import Report, Row
from probdefense.study.job import Result
from probdefense.study.opponents import OTHER_NORMS
from probdefense.study.request import JUDGE
from probdefense.tables import chance, format_table, listed, points

HELD = "\N{NO-BREAK SPACE}"

POINTER = "report.html has every pair and check"


def lines(result: Result, width: int = 80, verbose: bool = False) -> list[str]:
    """The accuracies, what they cost, checks and pairs; no line is longer than `width` where words allow.

    Args:
        result: Of the command.
        width: Characters of a line.
        verbose: Whether every pair, note and piece of advice is said, and not only counted.
    """
    report, rows = result.report, result.report.rows
    notes = [*_budget(result), _spent(rows), *_certificates(result), *_worst(report)]
    notes += [*_other_norms(rows), *_priors(rows)] if verbose else []
    checks, pairs = _checks(result.checks, report, verbose), _pairs(result.comparison, report, verbose)
    pointer = [] if verbose else [f"{POINTER}; --verbose prints them here"]
    return _laid([_accuracies(report, width, _certified(result)), notes, checks, pairs, pointer], width)


def judged(
    report: Report, comparison: Comparison | None, checks: Mapping[str, Checks] | None, width: int = 80
) -> list[str]:
    """The same of what ``evaluate`` and ``report`` have: accuracies, what they cost, checks and pairs."""
    said, pairs = _checks(checks or {}, report, verbose=False), _pairs(comparison, report, verbose=False)
    pointer = [POINTER] if said or pairs else []
    notes = [_spent(report.rows), *_worst(report)]
    return _laid([_accuracies(report, width, {}), notes, said, pairs, pointer], width)


def _worst(report: Report) -> list[str]:
    """The note on a worst case above one of its attacks, if there is one."""
    note = by_chance(report)
    return [f"{note[0].lower()}{note[1:-1]}"] if note else []


def _laid(groups: Iterable[list[str]], width: int) -> list[str]:
    """Groups of lines with space between; all but the first, which is tables, are wrapped."""
    found: list[str] = []
    for number, group in enumerate(each for each in groups if each):
        found += [""] if number else []
        for line in group:
            found += [line] if number == 0 else _wrapped(line, width)
    return found


def fitted(text: str, width: int = 80) -> str:
    """A text whose long lines are wrapped."""
    return "\n".join(
        part
        for line in text.splitlines()
        for part in (_wrapped(line, width) if len(line) > width else [line])
    )


def _wrapped(line: str, width: int) -> list[str]:
    """A line in several, the later ones indented; names and intervals stay whole."""
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    whole = re.sub(r"\[[^]]*\]", lambda interval: interval[0].replace(" ", HELD), line)
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    found = textwrap.wrap(whole, width, subsequent_indent=indent, **options)
    return [each.replace(HELD, " ") for each in found]


def _accuracies(report: Report, width: int, certified: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Tables of a line per defense and rule, as many columns in each as fit, in the order of the page.

    What nobody has is left out. `certified` are further cells of a defense, by column.
    """
    rows, names = told_apart(ranked(report).rows), columns_of(report)
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        place = row["defense"], row["rule"]
        line = cells.setdefault(place, dict(zip(("defense", "rule"), place, strict=True)))
        line[names[row["attack"], row["eps"]]] = _share(row)
    for name, more in certified.items():
        next(line for (defense, _), line in cells.items() if defense == name).update(more)
    columns = [*names.values(), *dict.fromkeys(column for more in certified.values() for column in more)]
    text = _wrapped(_title(report), width)
    while columns:
        taken = next(
            n for n in range(len(columns), 0, -1) if n == 1 or _width(cells.values(), columns[:n]) <= width
        )
        text += ["", *_table(cells.values(), columns[:taken]).splitlines()]
        columns = columns[taken:]
    return text


def _table(cells: Iterable[dict[str, Any]], columns: list[str]) -> str:
    """Lines with something under these columns."""
    kept = [line for line in cells if any(name in line for name in columns)]
    return format_table(kept, ("defense", "rule", *columns))


def _width(cells: Iterable[dict[str, Any]], columns: list[str]) -> int:
    return max(map(len, _table(cells, columns).splitlines()))


def _certified(result: Result) -> dict[str, dict[str, str]]:
    """Certified accuracy at the radius of the attacks, by defense and column."""
    radius = radius_of(result.report)
    found = {}
    for name, certificate in result.certificates.items():
        column = f"certified, {norm_name(certificate.norm)} {radius:g}"
        found[name] = {column: _share(_at(result, name, radius))}
    return found


def _at(result: Result, name: str, radius: float) -> Row:
    """Certified accuracy of a defense at a radius."""
    certificate = result.certificates[name]
    return certificate.curve(result.test[1][: len(certificate.label)], [radius])[0]


def _title(report: Report) -> str:
    """What the numbers are, under what, and of how many images."""
    title = "accuracy in % and its 95 % interval"
    if count := report.rows[0].get("num_seeds"):
        title = f"mean accuracy over {count} seeds in %, its deviation between seeds and its 95 % interval"
    radii = [f"{radius:g}" for radius in sorted({row["eps"] for row in report.rows} - {0})]
    threat = f"{norm_name(report)} {'radii' if radii[1:] else 'radius'} {listed(radii)}, " if radii else ""
    counts = sorted({row["num_examples"] for row in report.rows})
    return f"{title}; {threat}{' to '.join(map(str, {counts[0]: 0, counts[-1]: 0}))} images"


def _share(row: Row) -> str:
    spread = f" ±{100 * row['seed_spread']:.1f}" if "seed_spread" in row else ""
    return f"{100 * row['accuracy']:.1f}{spread} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"


def _spent(rows: Iterable[Row]) -> str:
    """Gradients or queries per image, by attack, and draws per call where they are the same for all."""
    spent: dict[str, list[tuple[str, float, int]]] = {}
    for row in rows:
        if row["attack_samples"] is not None:
            kind = "gradients" if row["gradients"] else "queries"
            cost = row[kind] / row["num_examples"]
            spent.setdefault(row["attack"], []).append((kind, cost, row["attack_samples"]))
    each = [f"{attack} {_ranges(attack, costs)}" for attack, costs in spent.items()]
    return f"spent per image: {'; '.join(each)}" if each else "spent: nothing, no attack ran"


def _ranges(attack: str, costs: list[tuple[str, float, int]]) -> str:
    """The range over defenses, for every number of draws per call; the suite chooses its draws itself."""
    groups: dict[tuple[str, str], list[float]] = {}
    for kind, cost, draws in costs:
        suffix = "" if attack == JUDGE else f" ({draws} draw{'s' * (draws != 1)} per call)"
        groups.setdefault((kind, suffix), []).append(round(cost))
    return ", ".join(f"{_range(found, kind)}{suffix}" for (kind, suffix), found in groups.items())


def _range(found: list[float], kind: str) -> str:
    """The smallest and the largest count, or the one."""
    low, high = min(found), max(found)
    one = {"gradients": "gradient", "queries": "query"}[kind]
    return f"{low} to {high} {kind}" if low < high else f"{low} {one if low == 1 else kind}"


def _budget(result: Result) -> list[str]:
    asked = result.report.settings
    epochs = f"{asked['epochs']} epoch{'s' * (asked['epochs'] != 1)}"
    return [
        f"budget: {epochs}, {asked['gradients']} gradients per image and attack,",
        f"  at most {asked['suite_budget']} evaluations for the suite: so that it ends in minutes",
    ]


def _other_norms(rows: Iterable[Row]) -> list[str]:
    names = dict.fromkeys(row["attack"] for row in rows if row["attack"] in OTHER_NORMS)
    return [
        f"{name} minimizes the L{OTHER_NORMS[name]} norm; a point counts within the radius" for name in names
    ]


def _priors(rows: Iterable[Row]) -> Iterable[str]:
    found = [row for row in rows if "prior" in row]
    return dict.fromkeys(
        f"{row['defense']}: prior {row['prior']}, KL weight {row['kl_weight']:g}" for row in found
    )


def _certificates(result: Result) -> list[str]:
    """What certificates are about, in one line where they were made alike."""
    draws, attacked = result.report.settings["num_samples"], norm_name(result.report)
    about: dict[str, list[str]] = {}
    for name, found in result.certificates.items():
        text = f"input noise {found.sigma:g}, alpha {found.alpha:g}, {len(found.label)} images"
        if norm_name(found.norm) != attacked:
            text += f"; {norm_name(found.norm)} is another ball than the one attacked"
        if note := out_of_reach([_at(result, name, radius_of(result.report))]):
            text += f"; {note}"
        text += f"; {seed}" if (seed := of_first(result.report)) else ""
        about.setdefault(text, []).append(name)
    return [
        f"certificate, {', '.join(names)}: of the infinite vote, not of {draws} draws; {text}"
        for text, names in about.items()
    ]


def _checks(checks: Mapping[str, Checks], report: Report, verbose: bool) -> list[str]:
    """One line per defense, in the order of the page; what fired and cannot tell, with advice if asked."""
    if not checks:
        return []
    asked = report.settings
    budget = f"{asked['checked']} images, {asked['check_gradients']} gradients per image"
    seed = f" {of_first(report)}" if of_first(report) else ""
    said = [f"checks{seed} at {budget}, which is little; checks.run takes more"]
    for name, found in ((name, checks[name]) for name in ranked(report).defenses if name in checks):
        doubts = [*found.fired, *found.unsure]
        names = ", ".join(f"{check.name} ({check.verdict})" for check in doubts)
        said.append(f"checks, {name}: {_counts(found)}{f': {names}' if doubts and not verbose else ''}")
        said += [f"  {check.name}: {check.verdict}. {check.advice}" for check in doubts if verbose]
    return said


def _counts(found: Checks) -> str:
    """How many checks ran and what they said, and how many do not apply."""
    quiet, unsure = sum(check.verdict == "ok" for check in found), len(found.unsure)
    said = [
        f"{quiet} ok, {len(found.fired)} fired",
        f"{unsure} cannot tell" if unsure else "",
        unapplied(found),
    ]
    return ", ".join(filter(None, said))


def _pairs(comparison: Comparison | None, report: Report, verbose: bool) -> list[str]:
    """Differences under the worst case, in percentage points: to the best defense, or all of them."""
    if comparison is None:
        return []
    rows = comparison.rows
    hardest = "worst" if any(row["attack"] == "worst" for row in rows) else rows[-1]["attack"]
    rows = in_order([row for row in rows if row["attack"] == hardest], ranked(report).defenses)
    title = f"pairs under {hardest}, in points; {comparison.scope}"
    title += f"; {unequal(report)}" if hardest == "worst" and unequal(report) else ""
    if verbose:
        return [title, *map(_pair, rows)]
    counts = dict.fromkeys(row["num_examples"] for row in rows)
    groups = [[row for row in rows if row["num_examples"] == count] for count in counts]
    return [title, *(line for group in groups for line in _best(group))]


def _pair(row: Row) -> str:
    return (
        f"  {row['a']} - {row['b']}: {points(row['difference'])} "
        f"[{100 * row['low']:z.1f}, {100 * row['high']:z.1f}], "
        f"P({row['a']} is better) {_chance(row['probability'])}, p {_chance(row['p_holm'])} (Holm)"
    )


def _chance(value: float) -> str:
    text = chance(value)
    return text if text[0] in "<>" else f"= {text}"


def _best(rows: list[Row]) -> list[str]:
    """Who has the most among those that saw the same images; no winner without a difference that is told."""
    accuracy = {row[side]: row[f"accuracy_{side}"] for row in rows for side in "ab"}
    most = max(accuracy.values())
    first = [name for name in accuracy if points(accuracy[name] - most) == "tie"]
    told = {True: [], False: []}  # type: dict[bool, list[str]]
    for name in (name for name in accuracy if name not in first):
        pairs = [row for row in rows if name in (row["a"], row["b"]) and {row["a"], row["b"]} & {*first}]
        sure = all(row["p_holm"] < LEVEL for row in pairs)
        told[sure].append(f"{name} ({points(most - accuracy[name])})")
    tie = f"{listed(first)} tie at {100 * most:.1f}" if len(first) > 1 else ""
    above = f"{'and are' if tie else 'is'} above {', '.join(told[True])}" if told[True] else ""
    close = f"not told apart from {', '.join(told[False])}" if told[False] else ""
    if not above:
        return [f"  no winner: {'; '.join(filter(None, (tie, close))) if tie else f'{first[0]} is {close}'}"]
    return [f"  {tie or first[0]} {above}{f'; {close}' if close else ''}"]
