"""Rows as aligned text."""

from collections.abc import Mapping, Sequence
from typing import Any

PERCENT = ("accuracy", "low", "high", "difference")
"""Entries that tables show in percent, or in percentage points."""


def format_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], percent: Sequence[str] = PERCENT
) -> str:
    """Rows as aligned text under the names of the columns; what is missing is a dash."""
    cells = [list(columns), *([_cell(row.get(name), name in percent) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(value: Any, percent: bool) -> str:
    if value is None:
        return "-"
    if percent:
        return f"{100 * value:.1f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
