"""What all checks share: the threat model, attacks at a budget, verdicts, and the test that fires."""

import math
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probdefense.attacks.apgd import apgd
from probdefense.checks.refusals import Tally
from probdefense.evaluation.comparison import paired
from probdefense.logits.adapters import Samples
from probdefense.logits.rules import verdicts
from probdefense.prediction.drawing import draw_groups
from probdefense.rng import derive
from probdefense.types import Attack, Inputs, Labels, Logits, LogitsFn, LossFn, Norm, Rule

TOLERANCE = 0.03
"""Points of accuracy that no check minds."""

LEVEL = 0.01
"""Of the one-sided tests."""

STEPS = 40
"""Steps per restart of the attack that is checked."""

MORE = 4
"""How many times the budget tells an attack that is too weak from a defense that masks."""

DETACHED = "do not depend on x differentiably"
"""What attacks say of answers that are cut off from the input."""


@dataclass
class Bench:
    """A defense under a threat model, and a budget of gradients for every attack on it."""

    logits_fn: LogitsFn
    x: Inputs
    y: Labels
    eps: float
    norm: Norm
    rule: Rule
    loss: LossFn
    num_gradients: int
    num_samples: int
    num_verdict: int
    seed: int
    tally: Tally = field(default_factory=Tally)
    known: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def draws(self) -> int:
        """Draws per gradient step of the attack that is checked."""
        return min(self.num_samples, self.num_gradients) if self.logits_fn.stochastic else 1

    @property
    def restarts(self) -> int:
        """Its restarts, which are worth more than steps beyond `STEPS`."""
        return max(1, self.num_gradients // self.draws // STEPS)

    @property
    def steps(self) -> int:
        """Its steps per restart."""
        return self.num_gradients // self.draws // self.restarts

    @property
    def unbounded(self) -> float:
        """A radius that holds the whole box."""
        return {math.inf: 1.0, 2: math.sqrt(self.x[0].numel())}.get(self.norm, float(self.x[0].numel()))

    @property
    def num_classes(self) -> int:
        """Width of the logits."""
        with torch.no_grad():
            return self.logits_fn(self.x[:1]).shape[-1]

    @property
    def one_draw(self) -> dict[str, Any]:
        """The same gradients at one draw per step."""
        restarts = max(1, self.num_gradients // STEPS)
        return {"draws": 1, "restarts": restarts, "steps": self.num_gradients // restarts}

    def budget(self, more: int) -> dict[str, Any]:
        """A multiple of the budget: more steps, and more draws (restarts where nothing is random)."""
        wider = math.isqrt(more)
        draws, restarts = (wider, 1) if self.draws > 1 else (1, wider)
        return {
            "steps": more // wider * self.steps,
            "restarts": restarts * self.restarts,
            "draws": draws * self.draws,
        }

    def points(self, attack: Attack, name: str, draws: int, logits_fn: Any = None) -> Inputs:
        """Where an attack leads; nowhere if the function gives it no gradient."""
        seen = Samples(self.logits_fn if logits_fn is None else logits_fn, draws)
        with warnings.catch_warnings():
            # A check of its own reports it.
            warnings.filterwarnings("ignore", message="the answers look like probabilities")
            try:
                return attack(seen, self.x, self.y, norm=self.norm, seed=derive(self.seed, name))
            except ValueError as error:
                if not detached(error):
                    raise
                return self.x

    def reached(self, attack: Attack, draws: int | None = None) -> np.ndarray:
        """Verdicts after any attack."""
        return self.correct(self.points(attack, "other", draws or self.draws))

    def climbed(
        self,
        name: str,
        *,
        eps: float | None = None,
        steps: int | None = None,
        restarts: int | None = None,
        draws: int | None = None,
        loss: LossFn | None = None,
        logits_fn: Any = None,
    ) -> np.ndarray:
        """Verdicts after Auto-PGD: the attack that is checked, or a variation of it."""
        ascent = partial(
            apgd,
            eps=self.eps if eps is None else eps,
            num_steps=steps or self.steps,
            num_restarts=restarts or self.restarts,
            loss=loss or self.loss,
            rule=self.rule,
        )
        return self.correct(self.points(ascent, name, draws or self.draws, logits_fn))

    def base(self, more: int = 1) -> np.ndarray:
        """Verdicts after the attack that is checked, at a multiple of its budget."""
        if more not in self.known:
            self.known[more] = self.climbed("base", **(self.budget(more) if more > 1 else {}))
        return self.known[more]

    def logits(self, points: Inputs) -> list[Logits]:
        """Verdict draws, the same for all points."""
        return draw_groups(self.logits_fn, points, self.num_verdict, derive(self.seed, "verdict"))

    def correct(self, points: Inputs) -> np.ndarray:
        """Verdicts, ``(verdicts, batch)``."""
        groups = self.logits(points)
        self.tally.note(points, groups[0])
        judged = [verdicts(self.rule, group, self.y) for group in groups]
        return torch.cat(judged).cpu().numpy().astype(float)


def detached(error: Exception) -> bool:
    """Whether an attack failed because no gradient leads from the answers to the input."""
    return DETACHED in str(error)


def perhaps(values: np.ndarray | Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether the mean of differences is above the tolerance, surely or not."""
    return float(np.mean(np.asarray(values, dtype=float))) > tolerance


def beyond(values: np.ndarray | Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether the mean of differences in [-1, 1] is above the tolerance, by a one-sided test.

    Args:
        values: ``(rows, batch)`` or ``(batch,)``.
        tolerance: What no check minds.
    """
    table = np.atleast_2d(np.asarray(values, dtype=float))
    mean, spread = paired(table)
    return spread.p_value(mean - tolerance) < LEVEL
