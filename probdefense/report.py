"""`Report`: what an evaluation found, as rows with intervals and arrays per example."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]

COLUMNS = ("defense", "attack", "eps", "rule", "accuracy", "low", "high", "attack_samples", "gradients")


@dataclass
class Report:
    """Robust accuracy by defense, attack, radius and rule.

    Attributes:
        rows: One dict per number: defense, attack, eps, rule, accuracy, low, high (95 % interval),
            num_examples, num_samples (verdict draws), attack_samples (draws per attack call),
            queries and gradients (example x draw spent by the attack).
        settings: What was asked for: norm, seed, estimand, and anything else that names the number.
        arrays: Per-example results: ``correct/<defense>/<attack>/<eps>/<rule>`` of shape
            ``(verdicts, batch)``, ``distance/<defense>/<attack>/<eps>`` of shape ``(batch,)``.
        timing: Seconds by defense and attack; kept out of `rows` so that they depend on the seed alone.
    """

    rows: list[Row]
    settings: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)

    VERSION = 1

    def row(self, **wanted: Any) -> Row:
        """The one row whose entries equal the given ones, for example ``row(attack="pgd", rule="vote")``.

        Raises:
            KeyError: no row, or several.
        """
        found = [row for row in self.rows if all(row.get(k) == v for k, v in wanted.items())]
        if len(found) != 1:
            raise KeyError(f"expected one row with {wanted}, found {len(found)} of {len(self.rows)}")
        return found[0]

    def __add__(self, other: Report) -> Report:
        """The rows of both, for a table of several defenses.

        Raises:
            ValueError: the settings differ, so the numbers do not belong in one table.
        """
        if self.settings != other.settings:
            names = [
                k for k in self.settings | other.settings if self.settings.get(k) != other.settings.get(k)
            ]
            raise ValueError(f"reports with different settings do not add up: {', '.join(names)} differ")
        return Report(
            self.rows + other.rows,
            self.settings,
            self.arrays | other.arrays,
            self.timing | other.timing,
        )

    def table(self, columns: tuple[str, ...] = COLUMNS) -> str:
        """The rows as aligned text, accuracies and intervals in percent."""
        cells = [columns, *(tuple(_cell(name, row.get(name)) for name in columns) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``report.json``, ``timing.json`` and ``arrays.npz`` into a folder, made if needed.

        Each file is written beside its place and moved there whole; other files stay.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"version": self.VERSION, "settings": self.settings, "rows": self.rows}
        _write(folder / "report.json", json.dumps(content, indent=2, sort_keys=False) + "\n")
        _write(folder / "timing.json", json.dumps(self.timing, indent=2) + "\n")
        partial = folder / "arrays.npz.partial"
        with partial.open("wb") as file:
            np.savez_compressed(file, **self.arrays)  # type: ignore[arg-type]
        partial.replace(folder / "arrays.npz")
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Report:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: no report there.
            ValueError: another version.
        """
        folder = Path(folder)
        content = json.loads((folder / "report.json").read_text())
        if content.get("version") != cls.VERSION:
            raise ValueError(f"expected report version {cls.VERSION}, got {content.get('version')}")
        with np.load(folder / "arrays.npz") as arrays:
            kept = {name: arrays[name] for name in arrays.files}
        timing = json.loads((folder / "timing.json").read_text())
        return cls(content["rows"], content["settings"], kept, timing)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("accuracy", "low", "high"):
        return f"{100 * value:.1f}"
    return f"{value:g}" if isinstance(value, float) else str(value)
