"""`Report`: what an evaluation found, as rows with intervals and arrays per example."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from probdefense.evaluation.arrays import Arrays, radii_of
from probdefense.evaluation.exports import COLUMNS, PLACE, Exports
from probdefense.evaluation.intervals import accuracy_interval
from probdefense.files import whole
from probdefense.ops import reach
from probdefense.tables import format_table
from probdefense.validation import check_kind

Row = dict[str, Any]

SEAL = "report.json"
"""Under this name the saved arrays hold the hash of themselves and of the rows that they belong to."""

DIMS = "dims.json"
"""Under this name they hold JSON whose ``dims`` are the names of the axes of every array, by key."""


@dataclass(repr=False)
class Report(Exports):
    """Robust accuracy by defense, attack, radius and rule.

    Attributes:
        rows: One dict per number: defense, attack, eps, rule, accuracy, low, high (95 % interval),
            num_examples, num_samples (verdict draws), draws (none, independent, or shared by the
            examples), attack_samples (draws per attack call), queries and gradients (example x draw
            spent by the attack).
        settings: What was asked for: norm, seed, estimand, and anything else that names the number.
        arrays: Per-example results: ``labels/<defense>`` and ``ids/<defense>``;
            ``correct/<defense>/<attack>/<eps>/<rule>`` of shape ``(verdicts, batch)``;
            ``log_probs/<defense>/<attack>/<eps>`` of the mean probability and ``expected_entropy/...`` in
            nats; ``distance/<defense>/<attack>`` of minimum-norm points,
            whose own verdicts stand under radius ``inf``. ``fingerprint/<defense>`` is a number
            that tells the defense from others, 0 where none is known.
        timing: Seconds by defense and attack; kept out of `rows` so that they depend on the seed alone.
    """

    rows: list[Row]
    settings: dict[str, Any] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=Arrays)
    timing: dict[str, float] = field(default_factory=dict)

    VERSION = 1

    def __post_init__(self) -> None:
        self.arrays = Arrays(self.arrays)

    def __repr__(self) -> str:
        asked = ", ".join(f"{name} {value}" for name, value in self.settings.items() if name != "versions")
        return f"Report of {', '.join(self.defenses)} ({asked})\n{self.table()}"

    def row(self, **wanted: Any) -> Row:
        """The one row whose entries equal the given ones, for example ``row(attack="pgd", rule="vote")``.

        Raises:
            ValueError: no row, or several.
        """
        found = [row for row in self.rows if all(row.get(k) == v for k, v in wanted.items())]
        if len(found) != 1:
            names = ", ".join(self.rows[0]) if self.rows else "none, there are no rows"
            raise ValueError(
                f"expected one row with {wanted}, found {len(found)} of {len(self.rows)}; entries to tell "
                f"them apart: {names}"
            )
        return found[0]

    def __add__(self, other: Report) -> Report:
        """The rows of both, for a table of several defenses.

        Raises:
            TypeError: something else than a report.
            ValueError: the settings differ, so the numbers do not belong in one table, or rows of the same
                defense, attack, radius and rule are in both.
        """
        if not isinstance(other, Report):
            raise TypeError(f"expected a Report to add, got {type(other).__name__}; evaluate makes one")
        if self.settings != other.settings:
            names = [
                k for k in self.settings | other.settings if self.settings.get(k) != other.settings.get(k)
            ]
            raise ValueError(
                f"expected the same settings, got others; reports with different settings do not add up: "
                f"{', '.join(names)} differ; evaluate both with the same ones"
            )
        places = {_place(row) for row in self.rows}
        doubled = [_place(row) for row in other.rows if _place(row) in places]
        if not doubled and (common := self.arrays.keys() & other.arrays.keys()):
            raise ValueError(
                f"expected reports of different defenses, got arrays {min(common)!r} in both; give every "
                "evaluation a name= of its own"
            )
        if doubled:
            twice = ", ".join(map(str, doubled[0]))
            raise ValueError(
                f"expected reports without a row in common, found that both have {twice}; "
                "give every evaluation a name= of its own"
            )
        return Report(
            self.rows + other.rows,
            self.settings,
            Arrays(self.arrays | other.arrays),
            self.timing | other.timing,
        )

    def __radd__(self, other: Any) -> Report:
        """``sum(reports)`` begins with 0.

        Raises:
            TypeError: anything else than a report or 0.
        """
        if isinstance(other, int) and other == 0:
            return self
        raise TypeError(f"expected a Report to add, got {type(other).__name__}; evaluate makes one")

    @staticmethod
    def merge(reports: Sequence[Report]) -> Report:
        """The report of a whole evaluation from those of its shards, byte for byte.

        Args:
            reports: Of the same defenses, attacks and settings on other examples (``first=`` of `evaluate`).

        Raises:
            TypeError: something else than several reports.
            ValueError: no reports, another defense, other settings or rows, or examples that are in several.

        Examples:
            >>> import torch, probdefense as pd
            >>> x, y = torch.rand(4, 4), torch.zeros(4).long()
            >>> evaluated = partial(pd.evaluate, pd.deterministic(torch.nn.Linear(4, 3)), chunk_size=2)
            >>> shards = [evaluated((x[i : i + 2], y[i : i + 2]), first=i) for i in (2, 0)]
            >>> Report.merge(shards).rows == evaluated((x, y)).rows
            True
        """
        if isinstance(reports, Report):
            raise TypeError("expected several reports to merge, got one Report; give [report, ...]")
        reports = list(reports)
        for each in reports:
            check_kind("reports", each, Report, "evaluate makes one")
        if not reports:
            raise ValueError("expected at least one report to merge, got none; evaluate makes them")
        first = reports[0]
        for other in reports[1:]:
            _check_shard(first, other)
        arrays = Arrays()
        for defense in first.defenses:
            ids = np.concatenate([report.arrays.at("ids", defense) for report in reports])
            if len(np.unique(ids)) < len(ids):
                raise ValueError(
                    f"expected shards with examples of their own, got some of {defense} twice; give first= "
                    "to evaluate"
                )
            for key in first.arrays.only(defense):
                axis = int(key.startswith("correct/"))
                joined = np.concatenate([report.arrays[key] for report in reports], axis)
                arrays[key] = np.take(joined, ids.argsort(), axis)
        rows = [
            _merged(same, arrays, first.settings) for same in zip(*(r.rows for r in reports), strict=True)
        ]
        timing = {name: sum(report.timing[name] for report in reports) for name in first.timing}
        return Report(rows, first.settings, arrays, timing)

    def only(self, defense: str) -> Report:
        """What concerns one defense.

        Raises:
            ValueError: no such defense.
        """
        if defense not in self.defenses:
            known = ", ".join(self.defenses)
            raise ValueError(f"expected one of {known}, got {defense!r}; it is the name= of evaluate")
        rows = [row for row in self.rows if row["defense"] == defense]
        timing = {k: v for k, v in self.timing.items() if k.split("/")[0] == defense}
        return Report(rows, self.settings, self.arrays.only(defense), timing)

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
            ValueError: no such attack, several defenses, or `radii` for an attack that ran at its own.
        """
        clean = self.row(attack="clean", rule=rule, **({} if defense is None else {"defense": defense}))
        name, draws = clean["defense"], clean["draws"]
        distance = self.arrays.get(self.arrays.key("distance", name, attack))
        if distance is None:
            if radii is not None:
                raise ValueError(
                    f"expected no radii for {attack!r}, which has a fixed budget, got {list(radii)}; run "
                    "evaluate with them as eps="
                )
            rows = [r for r in self.rows if (r["defense"], r["attack"], r["rule"]) == (name, attack, rule)]
            if not rows:
                known = ", ".join(dict.fromkeys(row["attack"] for row in self.rows))
                raise ValueError(f"expected an attack of the report, got {attack!r}; known: {known}")
            kept = ("eps", "accuracy", "low", "high")
            return [{k: row[k] for k in kept} for row in [clean, *sorted(rows, key=lambda row: row["eps"])]]
        before = self.arrays.at("correct", name, "clean", 0.0, rule)
        after = self.arrays.at("correct", name, attack, math.inf, rule)
        estimand = self.settings.get("estimand", "population")
        steps = [0.0, *np.unique(distance[np.isfinite(distance)])] if radii is None else radii_of(radii)
        judged = [(float(r), np.where(distance <= self._reach(r), after, before)) for r in steps]
        return [{"eps": r, **proportion(correct, draws, estimand)} for r, correct in judged]

    def _reach(self, radius: float) -> float:
        """How long a perturbation of that radius may measure."""
        asked = self.settings
        about = asked.get("pixels", 1), asked.get("dtype", "float32")
        return float(reach(radius, float(asked.get("norm", "inf")), *about))

    def table(self, columns: tuple[str, ...] = COLUMNS) -> str:
        """The rows as aligned text, accuracies and intervals in percent."""
        return format_table(self._shown(columns), columns)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``arrays.npz``, ``timing.json`` and ``report.json`` into a folder, made if needed.

        Each file is written beside its place and moved there whole; other files stay. The arrays carry a
        hash of the rows, so a set that was cut short is found by `load`, and under ``dims.json`` the names
        of their axes.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"version": self.VERSION, "settings": self.settings, "rows": self.rows}
        text = json.dumps(content, indent=2, sort_keys=False) + "\n"
        dims = json.dumps({"version": self.VERSION, "dims": self.arrays.dims()})
        about = {SEAL: _sealed(text, self.arrays), DIMS: np.array(dims)}
        with whole(folder / "arrays.npz") as place, place.open("wb") as file:
            np.savez_compressed(file, **self.arrays, **about)  # type: ignore[arg-type]
        with whole(folder / "timing.json") as place:
            place.write_text(json.dumps(self.timing, indent=2) + "\n")
        with whole(folder / "report.json") as place:
            place.write_text(text)
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Report:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: no report there.
            ValueError: another version, or files that do not belong together.
        """
        folder = Path(folder)
        text, kept, timing = _read(folder)
        content = json.loads(text)
        if content.get("version") != cls.VERSION:
            raise ValueError(
                f"expected report version {cls.VERSION}, got {content.get('version')}; evaluate and save it "
                "again"
            )
        if kept.pop(SEAL, None) != _sealed(text, kept):
            raise ValueError(
                f"expected the files of one report in {folder}, got arrays of another; a run was interrupted "
                "while it wrote them: evaluate and save again"
            )
        return cls(content["rows"], content["settings"], kept, timing)


def _read(folder: Path) -> tuple[str, Arrays, dict[str, float]]:
    """The text of ``report.json``, the arrays and the timing.

    Raises:
        FileNotFoundError: one of them is not there.
        ValueError: one of them is damaged.
    """
    try:
        text = (folder / "report.json").read_text()
        with np.load(folder / "arrays.npz") as arrays:
            kept = Arrays({name: arrays[name] for name in arrays.files if name != DIMS})
        if "version" not in json.loads(text):
            raise ValueError("no version")
        return text, kept, json.loads((folder / "timing.json").read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"expected the files of a report in {folder}, found no {error.filename}; Report.save and "
            "probdefense evaluate write them"
        ) from error
    except (ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"expected the files of a report in {folder}, got damaged ones ({error}); evaluate and save again"
        ) from error


def _check_shard(first: Report, other: Report) -> None:
    """Refuses two reports that are not of one evaluation.

    Raises:
        ValueError: other settings, defenses, attacks, or draws.
    """
    told = [
        [
            _place(row) + tuple(row[name] for name in ("num_samples", "draws", "attack_samples"))
            for row in each.rows
        ]
        for each in (first, other)
    ]
    if other.settings != first.settings or told[0] != told[1]:
        raise ValueError(
            "expected shards of one evaluation, got reports with other settings, defenses or attacks"
        )
    for name in first.defenses:
        marks = [each.arrays.get(Arrays.key("fingerprint", name), np.zeros(1)) for each in (first, other)]
        if len(np.unique(np.concatenate(marks))) > 1:
            raise ValueError(
                f"expected shards of one evaluation, got two networks under the name {name!r}: the defense "
                "differs; evaluate the same one on every part"
            )


def _merged(rows: Sequence[Row], arrays: Arrays, settings: dict[str, Any]) -> Row:
    """One row of several shards."""
    row = rows[0]
    correct = arrays.at("correct", row["defense"], row["attack"], row["eps"], row["rule"])
    spent = {name: sum(each[name] for each in rows) for name in ("queries", "gradients")}
    judged = proportion(correct, row["draws"], settings.get("estimand", "population"))
    return {**row, **judged, "num_examples": correct.shape[1], **spent}


def check_report(report: Any, name: str = "report") -> Report:
    """Refuses anything but a report with rows; returns it.

    Raises:
        TypeError: something else.
        ValueError: no rows.
    """
    check_kind(name, report, Report, "probdefense.evaluate(...) makes one")
    if not report.rows:
        raise ValueError(f"expected {name} with rows, got one without; evaluate something first")
    return report


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


def _place(row: Row) -> tuple[Any, ...]:
    """What names a number."""
    return tuple(row.get(name) for name in PLACE)


def _sealed(text: str, arrays: Arrays) -> np.ndarray:
    """What ties the arrays to each other and to the text of their ``report.json``."""
    total = hashlib.sha256(text.encode())
    for key, array in sorted(arrays.items()):
        total.update(f"{key} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return np.array(total.hexdigest())
