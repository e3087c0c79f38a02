"""Checks of what the function is: logits, declared randomness, and no memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

from probdefense.checks.bench import Bench, beyond
from probdefense.checks.results import Check, judged, skipped
from probdefense.logits.adapters import can_freeze
from probdefense.prediction.drawing import is_adaptive
from probdefense.rng import derive, forked
from probdefense.types import Inputs, Logits, LogitsFn

FEW = 8
"""Examples with which answers are compared."""

ROUNDING = 1e-3
"""Relative difference that the order of sums may cause."""


def outputs(bench: Bench, before: Tensor) -> Iterator[Check]:
    """Checks of the answers; `before` is what `answer` gave before anything attacked the function."""
    yield _logits(bench)
    yield _randomness(bench)
    yield _adaptation(bench, before)


def answer(bench: Bench, *, gradient: bool = False) -> Logits:
    """One answer about the inputs with the global random state seeded, ``(samples, batch, classes)``."""
    with torch.set_grad_enabled(gradient), forked(derive(bench.seed, "answer"), bench.x.device):
        return bench.logits_fn(bench.x.detach().requires_grad_(gradient), 2).detach()


def _logits(bench: Bench) -> Check:
    """What is no logit: probabilities, NaN, a constant that stands for "I do not say", a class for it."""
    logits = bench.logits(bench.x)[0]
    sums = (logits.sum(-1) - 1).abs()
    share = float(((logits >= 0).all(-1) & (sums < 1e-4)).double().mean())
    tally = bench.tally
    before, under = tally.share_constant()
    evidence = {"share of probabilities": share, "NaN": tally.refused / max(1, tally.asked)}
    evidence["one constant under attack"] = float(under.mean())
    extra = tally.extra_class(bench.y, logits.shape[-1])
    if extra is not None:
        evidence[f"class {extra[0]} under attack"] = float(extra[1].mean())
    advice = ""
    if share == 1:
        advice = "the answers are probabilities; a second softmax weakens every attack: return logits"
    elif tally.refused or tally.broken:
        advice = f"NaN is answered to attacked inputs, or is the gradient: {REFUSES}"
    elif beyond(under - before):
        advice = f"attacked inputs get one constant answer: {REFUSES}"
    elif extra is not None and beyond(extra[1].cpu()):
        advice = f"attacked inputs get class {extra[0]}, which is no label: {REFUSES}"
    return judged("logits", bool(advice), "fault", advice, evidence)


REFUSES = "if it means a refusal, count refusals apart and attack what refuses too (detection.evading)"
"""What to do about answers that say nothing."""


def _randomness(bench: Bench) -> Check:
    """Two answers of a function that says it is not random, and an answer that keeps a gradient."""
    function, name = bench.logits_fn, "declared randomness"
    first = answer(bench)
    with torch.no_grad():
        repeated = [function(bench.x, 2) for _ in range(3)]
    evidence = {"answers differ by": max(_distance(first, other) for other in repeated)}
    if not function.stochastic and evidence["answers differ by"] > ROUNDING:
        advice = "it says stochastic=False and answers differently: attacks see one draw; declare it"
        return Check(name, "fault", advice, evidence)
    if function.stochastic and _same_again(bench):
        advice = "it draws once for every number of draws and says the same again: draw anew at every call"
        return Check(name, "fault", advice, evidence)
    if repeats(bench):
        evidence["with a gradient by"] = _distance(first, answer(bench, gradient=True))
        if evidence["with a gradient by"] > ROUNDING:
            advice = "it answers otherwise when a gradient is taken: attacks see another function"
            return Check(name, "fault", advice, evidence)
    return Check(name, "ok", "", evidence)


def _adaptation(bench: Bench, before: Logits) -> Check:
    """Whether answers depend on earlier queries, or on the other inputs of the batch."""
    name, function = "no adaptation", bench.logits_fn
    if is_adaptive(function):
        return Check(name, "ok", "declared: judged by replays, attack it with fpa or gmsa")
    evidence = {}
    if not function.stochastic or repeats(bench):
        evidence["after queries by"] = _distance(before, answer(bench))
    if not function.stochastic or can_freeze(function):
        with torch.no_grad(), forked(derive(bench.seed, "alone"), bench.x.device):
            still = function.freeze(2) if function.stochastic else function
            whole = still(bench.x)[:, :FEW]
            evidence["alone by"] = _distance(whole, _one_by_one(still, bench.x[:FEW]))
    if not evidence:
        return skipped(name, "its random numbers are not torch's, and it cannot freeze")
    advice = "answers depend on other queries or inputs: declare an AdaptiveLogitsFn and attack it with gmsa"
    return judged(name, max(evidence.values()) > ROUNDING, "fault", advice, evidence)


def _same_again(bench: Bench) -> bool:
    """Whether two draws are the same at every call, and yet not among three."""
    with torch.no_grad():
        two, again, three = (bench.logits_fn(bench.x, count) for count in (2, 2, 3))
    if len(two) != 2 or len(three) != 3 or _distance(two, again) > ROUNDING:
        return False
    return _distance(two, three[:2]) > ROUNDING


def repeats(bench: Bench) -> bool:
    """Whether torch's seed fixes the answer; other sources of random numbers are out of reach."""
    return _distance(answer(bench), answer(bench)) <= ROUNDING


def _one_by_one(function: LogitsFn, x: Inputs) -> Logits:
    return torch.cat([function(part) for part in x.split(1)], dim=1)


def _distance(first: Logits, second: Logits) -> float:
    """Largest difference of log-probabilities, relative to their size."""
    one, other = (logits.log_softmax(-1) for logits in (first, second))
    if one.shape != other.shape:
        return torch.inf
    return float((one - other).abs().max() / (1 + one.abs().max()))
