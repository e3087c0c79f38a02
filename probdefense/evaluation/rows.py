"""From verdicts to rows: files what was seen in a report, under the radius at which it counts."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from probdefense.evaluation.points import Found, Spent, Threat
from probdefense.evaluation.report import Report, Row, proportion
from probdefense.evaluation.verdicts import Seen
from probdefense.ops import per_example
from probdefense.types import Inputs


class Candidate(NamedTuple):
    """Points that an attack has at some radius, and the radius under which their verdicts are filed."""

    attack: str
    eps: float
    points: Inputs


class Rows(NamedTuple):
    """The part of a report that is about one defense, while it is written."""

    report: Report
    defense: str
    draws: str

    def file_clean(self, seen: Seen) -> None:
        """The verdicts on the examples themselves."""
        self._file("clean", 0.0, seen, Spent())

    def file_found(
        self, label: str, found: Found, seen: Seen, clean: Seen, x: Inputs, threat: Threat
    ) -> list[tuple[float, Candidate]]:
        """The verdicts on an attack's points; what it has to offer at every radius is returned.

        Points of an attack without a budget count at the radii that they lie within; elsewhere the clean
        input stands.
        """
        if found.eps < math.inf:
            self._file(label, found.eps, seen, found.spent)
            candidate = Candidate(label, found.eps, found.points)
            return [(radius, candidate) for radius in threat.radii if radius >= found.eps]
        self._keep(label, math.inf, seen)
        self.report.arrays.put(_array(found.distance.to(x.dtype)), "distance", self.defense, label)
        offered = []
        for radius in threat.radii:
            inside = threat.inside(found.distance, radius, x)
            self._file(label, radius, seen.where(inside, clean), found.spent)
            points = torch.where(per_example(inside, x), found.points, x)
            offered.append((radius, Candidate(label, radius, points)))
        return offered

    def file_worst(self, radius: float, candidates: list[Candidate], chosen: dict[str, Tensor]) -> None:
        """For each example the verdict under the chosen candidate, by rule."""
        num_samples = self.report.rows[0]["num_samples"]
        for rule, index in chosen.items():
            places = [("correct", self.defense, one.attack, one.eps, rule) for one in candidates]
            correct = torch.stack([torch.as_tensor(self.report.arrays.at(*place)) for place in places])
            worst = correct.gather(0, index.cpu().expand(1, *correct.shape[1:])).squeeze(0)
            self.report.arrays.put(worst.numpy(), "correct", self.defense, "worst", radius, rule)
            self._add_row("worst", radius, rule, num_samples, Spent())

    def _file(self, attack: str, radius: float, seen: Seen, spent: Spent) -> None:
        self._keep(attack, radius, seen)
        for rule in seen.correct:
            self._add_row(attack, radius, rule, seen.num_samples, spent)
        self.report.timing[self.report.arrays.key(self.defense, attack, radius)] = spent.seconds

    def _keep(self, attack: str, radius: float, seen: Seen) -> None:
        """Keeps what is known of every example."""
        arrays, place = self.report.arrays, (self.defense, attack, radius)
        for rule, correct in seen.correct.items():
            arrays.put(_array(correct), "correct", *place, rule)
        arrays.put(_array(seen.log_probs), "log_probs", *place)
        arrays.put(_array(seen.expected_entropy), "expected_entropy", *place)

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


def _array(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()
