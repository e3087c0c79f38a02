"""What a report turns into: frames, labeled arrays, tables for papers, and one page of HTML."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from probdefense.evaluation.arrays import Arrays
from probdefense.tables import html_table, latex_table, markdown_table
from probdefense.validation import check_kind

COLUMNS = (
    "defense",
    "attack",
    "eps",
    "rule",
    "accuracy",
    "low",
    "high",
    "estimand",
    "attack_samples",
    "gradients/image",
)
"""What tables show; effort stands per image, as in the terminal and on the page."""

PLACE = ("defense", "attack", "eps", "rule")
"""What names a number, and the axes of `Exports.to_xarray`."""


EFFORT = ("gradients", "queries")
"""Entries that count all examples and draws of a row."""


class Exports:
    """The other forms of a `Report`, made by `evaluate`."""

    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    arrays: Arrays

    @property
    def defenses(self) -> list[str]:
        """The names of the defenses, in the order of the rows."""
        return list(dict.fromkeys(row["defense"] for row in self.rows))

    def _repr_html_(self) -> str:
        asked = [f"{name} {value}" for name, value in self.settings.items() if name != "versions"]
        title = f"Report of {', '.join(self.defenses)}"
        return html_table(self._shown(), COLUMNS, title, notes=[", ".join(asked)])

    def _shown(self, columns: tuple[str, ...] = COLUMNS) -> list[dict[str, Any]]:
        """The rows of a table, with effort per image and what the intervals are about.

        Raises:
            TypeError: columns that are no list of names.
            ValueError: a column that no row has.
        """
        check_kind("columns", columns, (tuple, list), "give names, as in ('attack', 'accuracy')")
        estimand = self.settings.get("estimand", "population")
        rows = [row | {"estimand": estimand} for row in per_image(self.rows)]
        known = dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)])
        if not columns or any(name not in known for name in columns):
            raise ValueError(
                f"expected columns of the report, got {', '.join(map(str, columns)) or 'none'}; known: "
                f"{', '.join(known)}"
            )
        return rows

    def to_pandas(self) -> Any:
        """The rows as a ``pandas.DataFrame``; shares are numbers in [0, 1].

        Examples:
            >>> import torch, probdefense as pd
            >>> data = torch.rand(4, 4), torch.zeros(4).long()
            >>> pd.evaluate(pd.deterministic(torch.nn.Linear(4, 3)), data).to_pandas()["attack"].tolist()
            ['clean', 'clean']
        """
        import pandas

        return pandas.DataFrame(self.rows)

    def to_xarray(self) -> Any:
        """The numbers as an ``xarray.Dataset`` over defense, attack, eps and rule; what was not run is NaN.

        Where all defenses saw the same examples, ``correct`` holds the share of verdicts that were right on
        every example, and ``label`` the true classes. The settings are an attribute, as JSON.

        Examples:
            >>> import torch, probdefense as pd
            >>> data = torch.rand(4, 4), torch.zeros(4).long()
            >>> found = pd.evaluate(pd.deterministic(torch.nn.Linear(4, 3)), data).to_xarray()
            >>> dict(found.sizes)
            {'defense': 1, 'attack': 1, 'eps': 1, 'rule': 2, 'example': 4}
        """
        import xarray

        coords = {name: list(dict.fromkeys(row[name] for row in self.rows)) for name in PLACE}
        coords["eps"] = sorted(coords["eps"])
        at = [tuple(coords[name].index(row[name]) for name in PLACE) for row in self.rows]
        shape = tuple(len(coords[name]) for name in PLACE)
        numbers = dict.fromkeys(name for row in self.rows for name, v in row.items() if _is_number(v))
        variables: dict[str, Any] = {}
        for name in [each for each in numbers if each not in PLACE]:
            variables[name] = PLACE, _placed(shape, at, [row.get(name) for row in self.rows])
        seen = [self.arrays.examples(name) for name in self.defenses]
        if seen and len(seen[0]) == 2 and all(np.array_equal(each, seen[0]) for each in seen):
            correct = [self.arrays.at("correct", *(row[name] for name in PLACE)).mean(0) for row in self.rows]
            label, ids = seen[0]
            variables["correct"] = (*PLACE, "example"), _placed((*shape, len(ids)), at, correct)
            variables["label"] = ("example",), label
            coords["example"] = ids.tolist()
        return xarray.Dataset(variables, coords, {"settings": json.dumps(self.settings, default=str)})

    def to_markdown(self, columns: tuple[str, ...] = COLUMNS) -> str:
        """The rows as a table of Markdown, accuracies and intervals in percent."""
        return markdown_table(self._shown(columns), columns)

    def to_latex(self, columns: tuple[str, ...] = COLUMNS) -> str:
        """The rows as a ``tabular`` of LaTeX, accuracies and intervals in percent; needs booktabs."""
        return latex_table(self._shown(columns), columns)

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        checks: Any = None,
        certificates: Any = None,
        images: Any = None,
        figures: Mapping[str, Any] | None = None,
        comparison: Any = None,
    ) -> Path:
        """Writes one page that says the verdict first and shows what it rests on.

        Args:
            path: A file that ends in ``.html``, or a folder, which gets a ``report.html``.
            checks: `Checks` of the one defense, or by the names of several.
            certificates: A `Certificate` of the one defense, or by the names of several; of the first
                examples of the report.
            images: Clean and attacked images ``(x, x_adv)``; or ``(x, x_adv, y, before, after)`` with two
                `Prediction`, whose labels and probabilities are shown then; or such by caption.
            figures: By caption, further matplotlib figures or axes.
            comparison: From `compare_all`; by default of all defenses, where they saw the same examples.

        Returns:
            The path of the file.

        Raises:
            TypeError: something else.
            ValueError: a report without rows, or results of a defense that is not in it.
            OSError: the file cannot be written.
        """
        # Loaded by name: pictures stand above evaluation, and heavy libraries with them.
        page = importlib.import_module("probdefense.analysis.html")
        given = {"checks": checks, "certificate": certificates, "images": images, "figures": figures}
        pairs = page.pairs_of(self) if comparison is None else comparison
        return page.write_html(self, path, comparison=pairs, **given)


def per_image(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with ``gradients/image`` and ``queries/image``, every draw counting as one."""
    return [
        row | {f"{name}/image": round(row[name] / row["num_examples"]) for name in EFFORT if name in row}
        for row in rows
    ]


def told_apart(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without those that repeat another rule's, because nothing is random."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        rule = row["rule"] if row.get("draws") != "none" else None
        numbers = (row["accuracy"], row["low"], row["high"])
        kept.setdefault((row["defense"], row["attack"], row["eps"], rule, *numbers), row)
    return list(kept.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _placed(shape: tuple[int, ...], at: list[tuple[int, ...]], values: list[Any]) -> np.ndarray:
    """Values at their places in an array of NaN."""
    array = np.full(shape, np.nan)
    for place, value in zip(at, values, strict=True):
        array[place] = np.nan if value is None else value
    return array
