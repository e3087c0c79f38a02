"""Rows as aligned text, and as the HTML that a notebook shows."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

PERCENT = ("accuracy", "low", "high", "difference")
"""Entries that tables show in percent, or in percentage points."""

SMALLEST = 0.001
"""Probabilities below are not told apart."""

MOST = 60
"""So many rows a notebook shows."""


def format_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], percent: Sequence[str] = PERCENT
) -> str:
    """Rows as aligned text under the names of the columns; what is missing is a dash."""
    cells = [list(columns), *_cells(rows, columns, percent)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def html_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    title: str = "",
    percent: Sequence[str] = PERCENT,
    notes: Sequence[str] = (),
) -> str:
    """Rows as an HTML table under a title, for ``_repr_html_``; of many rows the first.

    Examples:
        >>> html_table([{"name": "<b>", "accuracy": 0.5}], ["name", "accuracy"])[-56:]
        '<tr><td>&lt;b&gt;</td><td>50.0</td></tr></tbody></table>'
    """
    shown = _cells(rows[:MOST], columns, percent)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in shown)
    more = [f"{len(rows) - MOST} rows more"] if len(rows) > MOST else []
    above = f"<p><b>{escape(title)}</b></p>" if title else ""
    below = "".join(f"<p>{escape(line)}</p>" for line in [*more, *notes])
    return f"{above}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"


def markdown_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], percent: Sequence[str] = PERCENT
) -> str:
    """Rows as a table of Markdown; names are shown as they are written."""
    lines = [list(columns), ["---"] * len(columns), *_cells(rows, columns, percent)]
    return "\n".join(f"| {' | '.join(re.sub(MARKED, _marked, cell) for cell in line)} |" for line in lines)


MARKED = r"[\\`*<|]|&(?=#?\w+;)"
"""What Markdown would read as marks of its own; a single underscore within a word it leaves alone."""


def _marked(found: re.Match[str]) -> str:
    return f"\\{found[0]}"


def latex_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], percent: Sequence[str] = PERCENT
) -> str:
    r"""Rows as a ``tabular`` of LaTeX with the rules of the package booktabs; numbers stand to the right."""
    numeric = [any(isinstance(row.get(name), int | float) for row in rows) for name in columns]
    head, *body = (
        f"{' & '.join(map(_tex, line))} \\\\" for line in [list(columns), *_cells(rows, columns, percent)]
    )
    begin = rf"\begin{{tabular}}{{{''.join('r' if number else 'l' for number in numeric)}}}"
    return "\n".join([begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"])


SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    each: f"\\{each}" for each in "&%$#_{}"
}


def _tex(text: str) -> str:
    return "".join(SPECIAL.get(letter, letter) for letter in text)


def _cells(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], percent: Sequence[str]
) -> list[list[str]]:
    return [[_cell(row.get(name), name in percent) for name in columns] for row in rows]


def points(difference: float) -> str:
    """A difference of shares in percentage points; what would be printed as 0.0 is said to be a tie.

    Examples:
        >>> points(0.125), points(-0.04), points(-0.0002)
        ('+12.5', '-4.0', 'tie')
    """
    text = f"{100 * difference:+z.1f}"
    return "tie" if text == "+0.0" else text


def chance(value: float) -> str:
    """A probability, with its ends cut where nothing can be told apart.

    Examples:
        >>> chance(0.25), chance(1e-9), chance(1 - 1e-9)
        ('0.250', '< 0.001', '> 0.999')
    """
    if value < SMALLEST:
        return f"< {SMALLEST:g}"
    return f"> {1 - SMALLEST:g}" if 1 - value < SMALLEST else f"{value:.3f}"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    Examples:
        >>> listed(["fgsm"]), listed(["fgsm", "pgd", "suite"])
        ('fgsm', 'fgsm, pgd and suite')
    """
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _cell(value: Any, percent: bool) -> str:
    if value is None:
        return "-"
    if percent:
        return f"{100 * value:z.1f}"
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split("\n"))
