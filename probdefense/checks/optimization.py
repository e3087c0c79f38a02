"""Checks of how the attack went: what it climbed, where it stopped, what it forgot."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probdefense.attacks.apgd import apgd
from probdefense.attacks.tools.selection import Best
from probdefense.checks.bench import Bench, beyond
from probdefense.checks.comparisons import compared
from probdefense.checks.results import Check, judged, skipped
from probdefense.logits.losses import dlr, margin
from probdefense.logits.rules import margins
from probdefense.types import Inputs, Logits


class Watched:
    """The function under attack, with a record of what every gradient step saw.

    Attributes:
        losses: What was climbed, one ``(batch,)`` per step.
        best: The point with the smallest margin on the draws of its step.
        margin: The margin at the last step, ``(batch,)``.
    """

    def __init__(self, bench: Bench):
        self.bench, self.best = bench, Best(bench.x)
        self.losses: list[Tensor] = []
        self.margin = torch.zeros(len(bench.x))

    @property
    def stochastic(self) -> bool:
        return self.bench.logits_fn.stochastic

    def __call__(self, x: Inputs, num_samples: int | None = None) -> Logits:
        logits = self.bench.logits_fn(x, num_samples)
        if x.requires_grad:
            seen = logits.detach()
            self.losses.append(self.bench.loss(seen, self.bench.y))
            self.margin = margins(self.bench.rule, seen, self.bench.y).mean(0)
            self.best.offer(x.detach(), self.margin)
        return logits

    def __getattr__(self, name: str) -> Any:
        if name == "bench":
            raise AttributeError(name)
        return getattr(self.bench.logits_fn, name)


def optimization(bench: Bench) -> Iterator[Check]:
    """Runs the attack that is checked from one start, watched."""
    watched = Watched(bench)
    ascent = partial(apgd, eps=bench.eps, num_steps=bench.steps, loss=bench.loss, rule=bench.rule)
    final = bench.correct(bench.points(ascent, "base", bench.draws, watched))
    if bench.restarts == 1:
        bench.known[1] = final
    losses = torch.stack(watched.losses).double().cpu().numpy()
    standing = final.mean(0) > 0.5
    yield _silent(bench, watched, final)
    yield _incomplete(losses, standing)
    yield _plateau(bench, _flat(losses, standing))
    yield _own_draws(watched, final)


def _silent(bench: Bench, watched: Watched, final: np.ndarray) -> Check:
    """Indicator 3 (silent success): a better point was met on the way than the one returned."""
    met = bench.correct(watched.best.x)
    evidence = {"accuracy": float(final.mean()), "at the best point met": float(met.mean())}
    advice = "keep the best point by its margin on fresh draws (apgd, or restarts), not the last one"
    return judged("silent success", beyond(final - met), "attack too weak", advice, evidence)


def _incomplete(losses: np.ndarray, standing: np.ndarray) -> Check:
    """Indicator 4 (incomplete optimization): the loss of examples that stand is still rising.

    Examples that have fallen count as done, so that nothing fires over the last few that stand.
    """
    name = "complete optimization"
    if len(losses) < 8:
        return skipped(name, "fewer than 8 steps")
    parts = np.stack([part.mean(0) for part in np.array_split(losses, 8)])
    total = parts.max(0) - losses[0]
    late = np.where(total > 0, (parts[-1] - parts[-2]) / np.maximum(total, 1e-300), 0.0).clip(-1, 1)
    late = np.where(standing, late, 0.0)
    evidence = {"of the rise in the last eighth": float(late.mean())}
    advice = "the loss still rises where the attack stops: give it more steps"
    return judged(name, beyond(late, LATE), "attack too weak", advice, evidence)


LATE = 0.05
"""Share of the whole rise of the loss that may fall into the last eighth of the steps."""


SCALE_FREE = (dlr, margin)
"""A ratio of differences, which weighs draws alike, and the difference, which a third class cannot bend."""


def _plateau(bench: Bench, flat: Check) -> Check:
    """The loss beside those that no scale of the logits can flatten; the one that leaves less counts."""
    free = min((bench.climbed("scale-free", loss=loss) for loss in SCALE_FREE), key=np.mean)
    other = compared(bench, flat.name, "a scale-free loss", free)
    evidence = {**flat.evidence, **other.evidence}
    if flat.fired or other.verdict == "ok":
        return replace(flat if flat.fired else other, evidence=evidence)
    return replace(other, advice=f"{other.advice}; climb logits (margin, DLR)", evidence=evidence)


def _flat(losses: np.ndarray, standing: np.ndarray) -> Check:
    """Loss plateau: the share of examples that stand and whose loss the ascent never raised."""
    name = "loss plateau"
    if len(losses) < 4:
        return skipped(name, "fewer than 4 steps")
    quarter = len(losses) // 4
    flat = standing & (
        losses[-quarter:].mean(0) <= losses[0]
    )  # the first step goes far, and noise comes next
    advice = "the attack climbs nothing: its loss is flat or misleads; climb logits (margin, DLR)"
    return judged(name, beyond(flat), "defense masks", advice, {"never raised": float(flat.mean())})


def _own_draws(watched: Watched, final: np.ndarray) -> Check:
    """Indicator 5 (transfer failure): success on what the attack saw, and not on the verdict's draws."""
    own = (watched.margin > 0).cpu().numpy()[None]
    evidence = {"accuracy": float(final.mean()), "on the attack's own draws": float(own.mean())}
    advice = "the attack fools the draws that it climbed and not others: give it fresh draws, or settle"
    return judged("fresh draws", beyond(final - own), "attack too weak", advice, evidence)
