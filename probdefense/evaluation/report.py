"""`Report`: what an evaluation found, as rows with intervals and arrays per example."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from probdefense.evaluation.intervals import accuracy_interval
from probdefense.tables import format_table

Row = dict[str, Any]

COLUMNS = ("defense", "attack", "eps", "rule", "accuracy", "low", "high", "attack_samples", "gradients")


@dataclass(repr=False)
class Report:
    """Robust accuracy by defense, attack, radius and rule.

    Attributes:
        rows: One dict per number: defense, attack, eps, rule, accuracy, low, high (95 % interval),
            num_examples, num_samples (verdict draws), draws (none, independent, or shared by the
            examples), attack_samples (draws per attack call), queries and gradients (example x draw
            spent by the attack).
        settings: What was asked for: norm, seed, estimand, and anything else that names the number.
        arrays: Per-example results: ``labels/<defense>``; ``correct/<defense>/<attack>/<eps>/<rule>`` of
            shape ``(verdicts, batch)``; ``log_probs/<defense>/<attack>/<eps>`` of the mean probability and
            ``expected_entropy/...`` in nats; ``distance/<defense>/<attack>`` of minimum-norm points,
            whose own verdicts stand under radius ``inf``.
        timing: Seconds by defense and attack; kept out of `rows` so that they depend on the seed alone.
    """

    rows: list[Row]
    settings: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)

    VERSION = 1

    def __repr__(self) -> str:
        asked = ", ".join(f"{name} {value}" for name, value in self.settings.items() if name != "versions")
        return f"Report of {', '.join(self.defenses)} ({asked})\n{self.table()}"

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

    @property
    def defenses(self) -> list[str]:
        """The names of the defenses, in the order of the rows."""
        return list(dict.fromkeys(row["defense"] for row in self.rows))

    def only(self, defense: str) -> Report:
        """What concerns one defense.

        Raises:
            KeyError: no such defense.
        """
        if defense not in self.defenses:
            raise KeyError(f"expected one of {', '.join(self.defenses)}, got {defense!r}")
        rows = [row for row in self.rows if row["defense"] == defense]
        arrays = {k: v for k, v in self.arrays.items() if k.split("/")[1] == defense}
        timing = {k: v for k, v in self.timing.items() if k.split("/")[0] == defense}
        return Report(rows, self.settings, arrays, timing)

    def curve(
        self, attack: str, rule: str, *, defense: str | None = None, radii: Sequence[float] | None = None
    ) -> list[Row]:
        """Accuracy as a function of the radius, as rows with eps, accuracy, low and high.

        A minimum-norm attack has a value at every radius, because a point counts as soon as it lies
        within; a fixed-budget attack has one at the radii that it was run with.

        Args:
            attack: Its name in the report.
            rule: The rule's name.
            defense: Its name; needed where the report holds several.
            radii: In pixels; for minimum-norm attacks only, by default those where a verdict changes.

        Raises:
            KeyError: no such attack, or several defenses.
            ValueError: `radii` for an attack that ran at its own.
        """
        clean = self.row(attack="clean", rule=rule, **({} if defense is None else {"defense": defense}))
        name, draws = clean["defense"], clean["draws"]
        distance = self.arrays.get(f"distance/{name}/{attack}")
        if distance is None:
            if radii is not None:
                raise ValueError(f"{attack!r} has a fixed budget; run evaluate with eps={list(radii)}")
            rows = [r for r in self.rows if (r["defense"], r["attack"], r["rule"]) == (name, attack, rule)]
            if not rows:
                raise KeyError(f"expected an attack of the report, got {attack!r}")
            kept = ("eps", "accuracy", "low", "high")
            return [{k: row[k] for k in kept} for row in [clean, *sorted(rows, key=lambda row: row["eps"])]]
        before = self.arrays[f"correct/{name}/clean/0/{rule}"]
        after = self.arrays[f"correct/{name}/{attack}/inf/{rule}"]
        estimand = self.settings.get("estimand", "population")
        steps = [0.0, *np.unique(distance[np.isfinite(distance)])] if radii is None else radii
        return [
            {"eps": float(r), **proportion(np.where(distance <= r, after, before), draws, estimand)}
            for r in steps
        ]

    def table(self, columns: tuple[str, ...] = COLUMNS) -> str:
        """The rows as aligned text, accuracies and intervals in percent."""
        return format_table(self.rows, columns)

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


def proportion(correct: np.ndarray, draws: str = "none", estimand: str = "population") -> Row:
    """Accuracy with its 95 % interval, as entries of a row.

    Args:
        correct: Verdicts, ``(verdicts, batch)``.
        draws: ``"none"``, ``"independent"`` or ``"shared"`` by the examples.
        estimand: See `intervals.accuracy_interval`.
    """
    low, high = accuracy_interval(
        correct, crossed=draws == "shared", random=draws != "none", estimand=estimand
    )
    return {"accuracy": float(correct.mean()), "low": float(low), "high": float(high)}


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
