"""Writes the pages of docs/results from their JSON files: paper's figure, ours, interval, note.

    python examples/reproduce/pages.py

No table of a page is written by hand. What a page says besides stands in ``findings/<item>.md``. The table of
every recipe of the command comes from ``digits.json``, the ``report.json`` of the command that it names.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent.parent / "docs" / "results"
FINDINGS = Path(__file__).parent / "findings"
ITEMS = (
    *("rse", "madry", "jump_relu", "rmc", "khan", "smoothing", "better_than_pgd"),
    *("contradiction_frozen_draw", "contradiction_shared_noise"),
    *("contradiction_adv_bnn", "contradiction_randomness"),
)
COLUMNS = ("attack", "radius", "rule", "c", "queries", "learning_rate", "layer", "epochs")
"""What else may name a figure, shown where the rows of a table differ in it."""

PICTURES = {"rse": "Clean digits, and for each defense the nearest points found that pass for the next digit"}
"""By script: what its picture shows."""

Row = dict[str, Any]


def page(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    found = FINDINGS / f"{result['item']}.md"
    parts = [f"# {result['title']}", result["about"]]
    parts += [found.read_text().strip()] if found.exists() else []
    parts += [f"```bash\n{result['command']}\n```"]
    radii = {row["eps"] for row in result["rows"] if row.get("eps")}
    columns = ("eps", *COLUMNS) if len(radii) > 1 else COLUMNS
    for title in dict.fromkeys(row["table"] for row in result["rows"]):
        parts += [f"## {title}", table([row for row in result["rows"] if row["table"] == title], columns)]
    if (RESULTS / f"{result['item']}.png").exists():
        parts += ["## Images", f"![{PICTURES[result['item']]}]({result['item']}.png)"]
    return "\n\n".join([*parts, card(result)]) + "\n"


def table(rows: list[Row], columns: Iterable[str] = COLUMNS) -> str:
    """The rows of one table; radii are shown where a page has several."""
    shown = [column for column in columns if len({row.get(column) for row in rows}) > 1]
    optional = {
        "paper": any(row.get("paper") is not None for row in rows),
        "note": any("note" in r for r in rows),
    }
    head = ["", *shown, *(["paper"] if optional["paper"] else []), "ours", "95 % interval"]
    head += ["note"] if optional["note"] else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["name"], *(text(row.get(column)) for column in shown)]
        cells += [text(row.get("paper"))] if optional["paper"] else []
        cells += list(ours(row)) + ([text(row.get("note"))] if optional["note"] else [])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ours(row: Row) -> tuple[str, str]:
    """A figure and its interval: accuracies and differences in percent."""
    if "value" in row:
        return f"{row['value']:.3g}", f"[{row['low']:.3g}, {row['high']:.3g}]"
    value = row["accuracy"] if "accuracy" in row else row["difference"]
    sign = "+" if "difference" in row else ""
    return f"{100 * value:{sign}.1f}", f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def text(value: Any) -> str:
    """A cell."""
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def card(result: dict[str, Any]) -> str:
    """What the figures are about, and their limits."""
    settings = result["settings"]
    known = ("data", "train_images", "images", "eps", "num_samples", "epochs", "learning_rate", "batch_size")
    lines = [f"{name}: {settings[name]}" for name in known if settings.get(name) is not None]
    others = {k: v for k, v in settings.items() if k not in (*known, "seeds")}
    lines += [f"other settings: {', '.join(f'{k} {v}' for k, v in others.items())}"] if others else []
    lines += [f"training seeds: {', '.join(map(str, result['seeds']))}"]
    lines += [f"hardware: {result['hardware']}; {result['cpu_seconds']} CPU seconds"]
    lines += [f"versions: {', '.join(f'{k} {v}' for k, v in result['versions'].items())}"]
    lines += ["accuracies in percent, by the mean probability of fresh draws unless a rule is named"]
    seeds = len(result["seeds"])
    lines += ["one training seed: about these networks, not these methods"] if seeds == 1 else []
    return "## Model card\n\n" + "\n".join(f"* {line}" for line in lines)


def every_recipe(report: dict[str, Any]) -> str:
    """The report of ``compare --defenses all`` as a page: a row per defense, a column per attack."""
    rows = [row for row in report["rows"] if row["rule"] == "mean_prob"]
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    shown = [name for name in ("clean", "pgd", "eot_pgd", "suite", "adaptive", "worst") if name in attacks]
    lines = [f"| defense | images | {' | '.join(shown)} |", "|---|---" + "|---" * len(shown) + "|"]
    for name in dict.fromkeys(row["defense"] for row in rows):
        found = {row["attack"]: row for row in rows if row["defense"] == name}
        cells = ["{} {}".format(*ours(found[a])) if a in found else "" for a in shown]
        lines.append(f"| {name} | {found['clean']['num_examples']} | {' | '.join(cells)} |")
    settings = {k: v for k, v in report["settings"].items() if isinstance(v, int | float | str)}
    card = "\n".join(f"* {name}: {value}" for name, value in settings.items())
    notes = FINDINGS / "digits.md"
    parts = ["# Every recipe of the command, on digits", "```bash\nprobdefense compare --defenses all\n```"]
    parts += [notes.read_text().strip()] if notes.exists() else []
    parts += ["\n".join(lines), "## Model card\n\n" + card]
    return "\n\n".join(parts) + "\n"


def overview(results: Iterable[str], missing: Iterable[str]) -> str:
    """The list of pages."""
    lines = [
        f"* [{json.loads((RESULTS / f'{item}.json').read_text())['title']}]({item}.md)" for item in results
    ]
    lines += [
        f"* `{item}`: not run at this scale; `python examples/reproduce/{item}.py --scale cpu`"
        for item in missing
    ]
    return (
        "# Reproduced tables\n\nEvery figure comes from a JSON file beside its page, which the command on "
        "the page writes; `--scale smoke` takes a minute. The scale `gpu` of each script was not run.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def main() -> None:
    """Writes every page of which there is a result."""
    there = [item for item in ITEMS if (RESULTS / f"{item}.json").exists()]
    for item in there:
        (RESULTS / f"{item}.md").write_text(page(json.loads((RESULTS / f"{item}.json").read_text())))
    if (RESULTS / "digits.json").exists():
        (RESULTS / "digits.md").write_text(every_recipe(json.loads((RESULTS / "digits.json").read_text())))
    (RESULTS / "tables.md").write_text(overview(there, [item for item in ITEMS if item not in there]))


if __name__ == "__main__":
    main()
