"""What the command prints: the table, what the attacks spent, pairs, checks and certificates."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from probdefense.evaluation.report import Row
from probdefense.progress import progress_bar
from probdefense.study.job import Result
from probdefense.study.opponents import OTHER_NORMS
from probdefense.study.request import JUDGE

PAIRS = 10
"""Up to this many pairs are all printed; of more, those with the best defense. The report has all."""


@contextmanager
def progress(total: int, first: bool) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """One bar with the time left for a whole job; without a terminal, a line whenever something starts.

    Args:
        total: Steps of the job.
        first: Whether this process is the one that speaks.

    Yields:
        A function that gets a line, and one to call after every step.
    """
    if not first:
        yield _silent, _still
    elif not sys.stderr.isatty():
        yield _say, _still
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with progress_bar("", None), Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("preparing", total=total)
            yield (
                lambda line: bar.update(task, description=line.partition(":")[0]),
                lambda: bar.advance(task),
            )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _silent(line: str) -> None:
    """Says nothing."""


def _still() -> None:
    """Shows nothing."""


def show(result: Result) -> None:
    """Prints a result for people."""
    from rich.console import Console

    rows = result.report.rows
    width = 60 + 17 * len({row["attack"] for row in rows})
    console = Console(width=None if sys.stdout.isatty() else width, markup=False, highlight=False)
    console.print(_accuracies(result))
    notes = (_budget(result), *_spent(rows), *_other_norms(rows), *_priors(rows), *_certificates(result))
    for line in (*notes, *_checks(result), *_pairs(result)):
        console.print(line, soft_wrap=True)


def _accuracies(result: Result) -> Any:
    """One line per defense and rule, one column per attack, and the certified accuracy."""
    from rich.table import Table

    rows, radius = result.report.rows, result.report.settings["eps"]
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    columns = [*attacks, f"certified, L2 {radius:g}"]
    table = Table("defense", "rule", *columns, title=_title(rows))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        lines.setdefault((row["defense"], row["rule"]), {})[row["attack"]] = _share(row)
    for name, certificate in result.certificates.items():
        y = result.test[1][: len(certificate.label)]
        first = next(cells for (defense, _), cells in lines.items() if defense == name)
        first[columns[-1]] = _share(certificate.curve(y, [radius])[0])
    for (defense, rule), cells in lines.items():
        table.add_row(defense, rule, *(cells.get(column, "-") for column in columns))
    return table


def _title(rows: list[Row]) -> str:
    if count := rows[0].get("num_seeds"):
        return f"mean accuracy over {count} seeds in %, its deviation between seeds and its 95 % interval"
    return "accuracy in % and its 95 % interval"


def _share(row: Row) -> str:
    spread = f" ±{100 * row['seed_spread']:.1f}" if "seed_spread" in row else ""
    return f"{100 * row['accuracy']:.1f}{spread} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"


def _spent(rows: Iterable[Row]) -> list[str]:
    """Gradients or queries per image, by attack, and draws per call where they are the same for all."""
    spent: dict[str, list[tuple[str, float, int]]] = {}
    for row in rows:
        if row["attack_samples"] is not None:
            kind = "gradients" if row["gradients"] else "queries"
            cost = row[kind] / row["num_examples"]
            spent.setdefault(row["attack"], []).append((kind, cost, row["attack_samples"]))
    return [f"spent per image, {attack}: {_ranges(attack, costs)}" for attack, costs in spent.items()]


def _ranges(attack: str, costs: list[tuple[str, float, int]]) -> str:
    """The range over defenses, for every number of draws per call; the suite chooses its draws itself."""
    groups: dict[tuple[str, str], list[float]] = {}
    for kind, cost, draws in costs:
        suffix = "" if attack == JUDGE else f" ({draws} draws per call)"
        groups.setdefault((kind, suffix), []).append(round(cost))
    return ", ".join(
        f"{min(found)} to {max(found)} {kind}{suffix}"
        if min(found) < max(found)
        else f"{found[0]} {kind}{suffix}"
        for (kind, suffix), found in groups.items()
    )


def _budget(result: Result) -> str:
    asked = result.report.settings
    return (
        f"budget: {asked['epochs']} epochs, {asked['gradients']} gradients per image and attack, at most "
        f"{asked['suite_budget']} evaluations for the suite: a compromise, so that it ends in minutes"
    )


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
    return [
        f"certificate, {name}: of the infinite vote, not of {result.report.settings['num_samples']} draws; "
        f"input noise {found.sigma:g}, alpha {found.alpha:g}, {len(found.label)} images"
        for name, found in result.certificates.items()
    ]


def _checks(result: Result) -> list[str]:
    """One line per defense, and one per check that fired."""
    asked = result.report.settings
    budget = f"{asked['checked']} images, {asked['check_gradients']} gradients per image"
    lines = [f"checks at {budget}: a small budget, checks.run takes more"] if result.checks else []
    for name, found in result.checks.items():
        quiet = sum(check.verdict == "ok" for check in found)
        lines.append(f"checks, {name}: {quiet} ok, {len(found.fired)} fired")
        lines += [f"  {check.name}: {check.verdict}. {check.advice}" for check in found.fired]
    return lines


def _pairs(result: Result) -> list[str]:
    """Differences under the worst case, in percentage points."""
    if result.comparison is None:
        return []
    rows = result.comparison.rows
    hardest = "worst" if any(row["attack"] == "worst" for row in rows) else rows[-1]["attack"]
    rows = [row for row in rows if row["attack"] == hardest]
    counts = dict.fromkeys(row["num_examples"] for row in rows)
    groups = [[row for row in rows if row["num_examples"] == count] for count in counts]
    lines = [
        f"  {row['a']} - {row['b']}: {100 * row['difference']:+.1f} "
        f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}], "
        f"P({row['a']} is better) = {row['probability']:.3f}, p = {row['p_holm']:.2g} (Holm)"
        for group in groups
        for row in _printed(group)
    ]
    return [f"pairs under {hardest}, in points; {result.comparison.scope}", *lines]


def _printed(rows: list[Row]) -> list[Row]:
    """All pairs that saw the same images if they are few, else those with the best defense."""
    if len(rows) <= PAIRS:
        return rows
    accuracy = {row[side]: row[f"accuracy_{side}"] for row in rows for side in "ab"}
    best = max(accuracy, key=lambda name: accuracy[name])
    return [row for row in rows if best in (row["a"], row["b"])]
