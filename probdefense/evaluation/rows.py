"""From records to rows: files what was seen in a report, under the radius at which it counts."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from probdefense.evaluation.points import Run, Spent, Threat
from probdefense.evaluation.records import Record
from probdefense.evaluation.report import Report, Row, proportion
from probdefense.ops import reach

Place = tuple[str, float]
"""An attack and the radius under which its verdicts are filed."""


class Rows(NamedTuple):
    """The part of a report that is about one defense, while it is written."""

    report: Report
    defense: str
    draws: str

    def file(self, records: Mapping[Place, Record], runs: list[Run], threat: Threat) -> None:
        """Files clean verdicts, every run and the worst case; ``(label, eps)`` names the records."""
        clean = records["clean", 0.0]
        self._file("clean", 0.0, clean)
        offered: dict[float, list[tuple[Place, Record]]] = {radius: [] for radius in threat.radii}
        for run in runs:
            for radius, place, record in self._file_run(run, records[run.label, run.eps], clean, threat):
                offered[radius].append((place, record))
        if len({run.label for run in runs}) > 1:
            for radius, candidates in offered.items():
                if candidates:  # none where every attack fixed a larger radius
                    self._file_worst(radius, candidates, clean.num_samples)

    def _file_run(
        self, run: Run, found: Record, clean: Record, threat: Threat
    ) -> list[tuple[float, Place, Record]]:
        """Files one run; returns what it has to offer at every radius.

        Points of an attack without a budget count at the radii that they lie within; elsewhere the clean
        input stands.
        """
        if run.eps < math.inf:
            self._file(run.label, run.eps, found)
            place = run.label, run.eps
            return [(radius, place, found) for radius in threat.radii if radius >= run.eps]
        self._keep(run.label, math.inf, found)
        distance, asked = found.arrays["distance"], self.report.settings
        self.report.arrays.put(distance, "distance", self.defense, run.label)
        offered = []
        for radius in threat.radii:
            inside = distance <= reach(radius, threat.norm, asked["pixels"], asked["dtype"])
            record = found.where(inside, clean)
            self._file(run.label, radius, record)
            offered.append((radius, (run.label, radius), record))
        return offered

    def _file_worst(self, radius: float, candidates: list[tuple[Place, Record]], num_samples: int) -> None:
        """For each example the verdict under the attack that leaves it the smallest margin, by rule."""
        records = [record for _, record in candidates]
        queries, gradients = (
            sum(getattr(r.spent, name) for r in records) for name in ("queries", "gradients")
        )
        for rule in records[0].rules:
            chosen = np.stack([record.arrays[f"margins/{rule}"] for record in records]).argmin(0)
            correct = np.stack([record.arrays[f"correct/{rule}"] for record in records])
            worst = np.take_along_axis(correct, chosen[None, None, :], axis=0)[0]
            self.report.arrays.put(worst, "correct", self.defense, "worst", radius, rule)
            self._add_row("worst", radius, rule, num_samples, Spent(None, queries, gradients))

    def _file(self, attack: str, radius: float, record: Record) -> None:
        self._keep(attack, radius, record)
        for rule in record.rules:
            self._add_row(attack, radius, rule, record.num_samples, record.spent)
        self.report.timing[self.report.arrays.key(self.defense, attack, radius)] = record.spent.seconds

    def _keep(self, attack: str, radius: float, record: Record) -> None:
        """Keeps what is known of every example."""
        arrays, place = self.report.arrays, (self.defense, attack, radius)
        for rule in record.rules:
            arrays.put(record.arrays[f"correct/{rule}"], "correct", *place, rule)
        for kind in ("log_probs", "expected_entropy"):
            arrays.put(record.arrays[kind], kind, *place)

    def _add_row(self, attack: str, radius: float, rule: str, num_samples: int, spent: Spent) -> None:
        array = self.report.arrays.at("correct", self.defense, attack, radius, rule)
        row: Row = {
            "defense": self.defense,
            "attack": attack,
            "eps": radius,
            "rule": rule,
            **proportion(array, self.draws, self.report.settings["estimand"]),
            "num_examples": array.shape[1],
            "num_samples": num_samples,
            "draws": self.draws,
            "attack_samples": spent.attack_samples,
            "queries": spent.queries,
            "gradients": spent.gradients,
        }
        self.report.rows.append(row)
