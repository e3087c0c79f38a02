"""Checks of the gradient that attacks follow: whether it is there, its signal, what it explains."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from probdefense.attacks.tools.gradient import climb, input_gradient
from probdefense.checks.bench import Bench, beyond, detached, perhaps
from probdefense.checks.outputs import repeats
from probdefense.checks.results import MORE_BUDGET, Check, doubted, judged, skipped
from probdefense.logits.adapters import Samples, can_freeze
from probdefense.logits.losses import margin
from probdefense.ops import Ball
from probdefense.rng import Stream, derive, forked
from probdefense.types import Inputs, Logits, LogitsFn, LossFn

DIRECTIONS = 32
"""Random directions in which the loss is probed."""


def gradients(bench: Bench) -> Iterator[Check]:
    """Checks of the gradient of the attack's loss at the clean inputs that are classified rightly."""
    right = torch.as_tensor(bench.correct(bench.x).mean(0) > 0.5, device=bench.x.device)
    if not bool(right.any()):
        right = torch.ones_like(right)
    function = Samples(bench.logits_fn, bench.draws)
    try:
        with forked(derive(bench.seed, "gradient"), bench.x.device):
            drawn = [_gradient(bench, function, right, bench.loss) for _ in range(_count(bench))]
    except ValueError as error:
        if not detached(error):
            raise
        advice = "the answers are detached from the inputs: attack through a stand-in (BPDA) or by queries"
        yield Check("gradient", "defense masks", advice, {"zero gradients": 1.0})
        yield skipped("gradient signal", "no gradient")
        yield skipped("stable loss", "no gradient")
        return
    yield _present(drawn[0], _gradient(bench, function, right, margin))
    yield _signal(bench, drawn)
    yield _explains(bench, right)


def _gradient(bench: Bench, function: LogitsFn, rows: Tensor, loss: LossFn) -> Tensor:
    """Gradients of a loss, ``(examples, elements)``."""
    x, y = bench.x[rows], bench.y[rows]
    return input_gradient(function, x, climb(loss, y), where="the check").gradient.flatten(1)


def _present(gradient: Tensor, of_margin: Tensor) -> Check:
    """Indicator 1 (unavailable gradients): the share of inputs where the gradient is exactly zero.

    The margin of the logits, which nothing saturates, tells a loss that is flat from a network that is.
    """
    zero, flat = ((part == 0).all(1).double() for part in (gradient, of_margin))
    evidence = {"zero gradients": float(zero.mean()), "of the margin": float(flat.mean())}
    if beyond(flat):
        advice = "the network is flat: attack through a stand-in (BPDA) or by queries"
        return Check("gradient", "defense masks", advice, evidence)
    advice = "the loss is flat where the network is not: climb the logits (margin, DLR)"
    return judged("gradient", beyond(zero), "attack too weak", advice, evidence)


def _count(bench: Bench) -> int:
    """How many gradients the signal is measured with."""
    return GRADIENTS if bench.logits_fn.stochastic else 1


GRADIENTS = 12
"""Of two, draws that all examples share would decide by one throw of a coin."""


def _signal(bench: Bench, drawn: list[Tensor]) -> Check:
    r"""How much of a mean gradient over draws is signal: $\mathrm{SNR}^2 = \cos / (1 - \cos)$.

    The cosine is that of gradients from draws of their own, the mean over pairs.
    """
    name = "gradient signal"
    if len(drawn) == 1:
        return skipped(name, "nothing is random")
    units = torch.stack([torch.nn.functional.normalize(part.double(), dim=1) for part in drawn])
    total, count = units.sum(0).square().sum(1), len(units)
    cosine = (total - units.square().sum((0, 2))) / (count * (count - 1))
    typical = float(cosine.mean())
    evidence = {"cosine": typical, "signal to noise": (max(typical, 0.0) / max(1 - typical, 1e-6)) ** 0.5}
    if beyond(LEAST_COSINE - cosine, 0.0):
        advice = "noise drowns the gradient: give the attack more draws per step, or more and smaller steps"
        return Check(name, "attack too weak", advice, evidence)
    if perhaps(CLEAR_COSINE - cosine, 0.0):
        return doubted(name, f"{MORE_BUDGET}: most of a gradient is noise; raise num_samples", evidence)
    return Check(name, "ok", "", evidence)


LEAST_COSINE = 0.1
"""Below this less than a tenth of the squared length of a gradient is signal."""

CLEAR_COSINE = 0.25
"""Above this nobody minds."""


def _explains(bench: Bench, rows: Tensor) -> Check:
    """Indicator 2 (unstable predictions): what the gradient explains of the loss one step away."""
    name = "stable loss"
    function = _still(bench)
    if function is None:
        return skipped(name, "its draws cannot be held still")
    x, y = bench.x[rows], bench.y[rows]
    climbed = climb(bench.loss, y)
    here = input_gradient(function, x, climbed, where="the check")
    ball = Ball(x, 2.5 * bench.eps / bench.steps, bench.norm)
    rng = Stream.of(derive(bench.seed, "directions"), x)
    told, found = [], []
    with torch.no_grad():
        for _ in range(DIRECTIONS):
            point = ball.start(rng)
            told.append(((point - x) * here.gradient).flatten(1).sum(1))
            found.append(climbed(function(point)) - here.value)
    explained = _share_explained(torch.stack(told).double(), torch.stack(found).double())
    moves = ~explained.isnan()
    if not bool(moves.any()):
        why = "the loss does not move one step away: nothing is there that a gradient could explain"
        return doubted(name, why, {"moves": 0.0})
    explained = explained[moves]
    advice = "the loss jumps where the gradient sees none: smooth it (NES, BPDA) or attack by queries"
    evidence = {"explained by the gradient": float(explained.mean())}
    return judged(name, beyond(LEAST_EXPLAINED - explained, 0.0), "defense masks", advice, evidence)


LEAST_EXPLAINED = 0.5
"""Share of the loss's variation one step away that a gradient must explain on average."""


def _share_explained(told: Tensor, found: Tensor) -> Tensor:
    """Share of the squared changes that the predicted ones explain, ``(directions, batch) -> (batch,)``.

    NaN where nothing changed.
    """
    left = (found - told).square().sum(0)
    total = found.square().sum(0)
    return torch.where(total > 0, 1 - left / total.clamp_min(1e-300), torch.nan).clamp(0.0, 1.0)


def _still(bench: Bench) -> LogitsFn | None:
    """The function with its draws held: frozen, or seeded at every call; None if neither holds them."""
    function = bench.logits_fn
    if not function.stochastic:
        return function
    seed = derive(bench.seed, "still")
    if can_freeze(function):
        with forked(seed, bench.x.device):
            return function.freeze(bench.draws)
    return Seeded(function, seed, bench.draws) if repeats(bench) else None


class Seeded(NamedTuple):
    """A function whose every call starts from one seed."""

    logits_fn: LogitsFn
    seed: int
    draws: int
    stochastic: bool = False

    def __call__(self, x: Inputs, num_samples: int | None = None) -> Logits:
        """``(samples, batch, classes)``, of the same draws every time."""
        with forked(self.seed, x.device):
            return self.logits_fn(x, num_samples or self.draws)

    def freeze(self, num_samples: int) -> "Seeded":
        """Itself with so many draws."""
        return self._replace(draws=num_samples)
