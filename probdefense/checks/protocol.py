r"""How does an evaluation use the randomness of a defense? Checks of the protocol behind a published number.

A protocol is a function ``(logits_fn, x, y) -> (points, correct)``: it attacks, judges, and says which
examples survived. It is handed the defense with a witness in between, who notes what is asked, whether two
answers in a row are the same, and whether the copies of an image in one batch get one and the same noise.
What was seen is then weighed: the points are judged again on fresh draws, and an attack with fresh draws
gets as many gradients. An attack on one draw that is none of the verdict's fires as a fault, as "attack too
weak" if fresh draws leave less; everything else fires only at a difference beyond three points.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probdefense.attacks.tools.border import outside_inference
from probdefense.checks.bench import Bench, beyond
from probdefense.checks.results import Check, Checks, Verdict, skipped
from probdefense.logits.adapters import Counted, as_logits_fn, can_freeze
from probdefense.logits.losses import expected_cross_entropy
from probdefense.logits.rules import mean_prob
from probdefense.ops import lp_norm, reach
from probdefense.rng import derive, forked
from probdefense.types import Inputs, Labels, Logits, LogitsFn, LossFn, Norm, Rule
from probdefense.validation import (
    check_count,
    check_function,
    check_inputs,
    check_kind,
    check_labels,
    check_like,
    check_norm,
    check_positive,
    check_seed,
)

Protocol = Callable[[LogitsFn, Inputs, Labels], tuple[Inputs, Tensor]]
"""What a paper did: ``(logits_fn, x, y) -> (points, correct)``, ``correct`` bool ``(batch,)``."""

FEWEST, MOST = 20, 400
"""Gradients per example that the attack beside the protocol gets, whatever the protocol took."""


def run(
    protocol: Protocol,
    logits_fn: Any,
    x: Inputs,
    y: Labels,
    *,
    eps: float,
    norm: Norm = math.inf,
    rule: Rule = mean_prob,
    loss: LossFn = expected_cross_entropy,
    num_samples: int = 4,
    num_verdict: int = 50,
    seed: int = 0,
) -> Checks:
    """Asks of an evaluation what has made the numbers of random defenses wrong, and weighs what it finds.

    The checks: `frozen draw`, points made on one draw held still and judged on others; `shared noise`, the
    copies of an image in a batch share their noise, so that averaging over them averages nothing; `gradient
    path`, no gradient of what is judged was taken; `lucky draw`, one draw decides, or more examples survive
    than on fresh draws; `any iterate`, fewer do; `fixed-seed twin`, the verdict stands on one draw that the
    attack did not know, and what is left if it does.

    Args:
        protocol: ``(logits_fn, x, y) -> (points, correct)``, the attack and the verdict as published.
        logits_fn: A random defense, a `Defense` or any `LogitsFn`.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        eps: Radius in pixels.
        norm: Of the threat model.
        rule: How draws become a decision.
        loss: What the attack beside the protocol climbs.
        num_samples: Its draws per step.
        num_verdict: Fresh draws on which points are judged.
        seed: Of everything.

    Returns:
        `Checks`: iterate it, index it by name, or print its ``table()``.

    Raises:
        ValueError: bad data or settings, a function without randomness, or a protocol that does not return
            points within the ball and one verdict per example.

    References:
        Dong and Xu, 2023, [Adversarial Robustness via Random Projection Filters](https://openaccess.thecvf.com/content/CVPR2023/papers/Dong_Adversarial_Robustness_via_Random_Projection_Filters_CVPR_2023_paper.pdf);
        Jeddi et al., 2020, [Learn2Perturb](https://arxiv.org/abs/2003.01090), whose published protocols
        are the planted faults of the tests

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.defenses.rse(torch.nn.Linear(4, 3), before_linear=True)
        >>> def published(f, x, y):
        ...     points = pd.attacks.pgd(f.freeze(1), x, y, eps=0.1, num_steps=5)
        ...     return points, f(points, 1)[0].argmax(-1) == y
        >>> found = run(published, defense, torch.rand(8, 4), torch.randint(3, (8,)), eps=0.1)
        >>> found["frozen draw"].evidence["held still"]
        1.0
    """
    check_function("protocol", protocol, "logits_fn", "x", "y")
    x, eps, norm, seed = check_inputs(x), check_positive("eps", eps), check_norm(norm), check_seed(seed)
    check_labels(y, len(x))
    check_function("rule", rule, "logits")
    check_function("loss", loss, "logits", "y")
    num_samples, num_verdict = (
        check_count("num_samples", num_samples),
        check_count("num_verdict", num_verdict),
    )
    function = as_logits_fn(logits_fn)
    if not function.stochastic:
        raise ValueError(
            "expected a random defense, got a function without randomness; checks.run is for any function"
        )
    with outside_inference(), forked(derive(seed, "protocol"), x.device):
        witness = Witness(function, [])
        points, correct = _claimed(protocol(witness, x.clone(), y.clone()), x, eps, norm)
        gradients = sum(call.draws * call.rows for call in witness.calls if call.gradient) // len(x)
        budget = max(FEWEST, min(MOST, gradients))
        bench = Bench(function, x, y, eps, norm, rule, loss, budget, num_samples, num_verdict, seed)
        claim = Claim(witness.calls, correct, bench.correct(points).mean(0), bench)
        checks = (_frozen_draw, _shared_noise, _gradient_path, _lucky_draw, _any_iterate, _twin)
        return Checks(tuple(check(claim) for check in checks))


class Call(NamedTuple):
    """One question: its size, whether it kept a gradient, and how the answer depended on chance.

    ``held`` says whether a second answer was the same; ``copies`` how often every image stood in the batch,
    and ``alike`` whether copies got the same answer.
    """

    gradient: bool
    draws: int
    rows: int
    held: bool
    copies: int
    alike: bool


class Witness:
    """The function under evaluation, with a record of what is asked of it and of all derived from it."""

    def __init__(self, logits_fn: LogitsFn, calls: list[Call]):
        self.logits_fn, self.calls = logits_fn, calls

    @property
    def stochastic(self) -> bool:
        """As the function itself."""
        return self.logits_fn.stochastic

    def __call__(self, x: Inputs, num_samples: int | None = None) -> Logits:
        """``(samples, batch, classes)``, noted."""
        logits = self.logits_fn(x, num_samples)
        with torch.no_grad():
            again = self.logits_fn(x.detach(), num_samples)
        held = again.shape == logits.shape and torch.allclose(again, logits.detach(), rtol=1e-4, atol=1e-5)
        images, answers = _different(x.detach()), _different(logits[0].detach())
        gradient = logits.requires_grad and x.requires_grad
        call = Call(gradient, len(logits), len(x), held, len(x) // images, answers <= images)
        self.calls.append(call)
        return logits

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("logits_fn", "calls"):
            raise AttributeError(name)
        value = getattr(self.logits_fn, name)
        if name not in Counted.DERIVED or value is None:
            return value
        if not inspect.isroutine(value):
            return Witness(value, self.calls)
        return lambda *args, **kwargs: Witness(value(*args, **kwargs), self.calls)


class Claim(NamedTuple):
    """What the protocol asked and says, and what fresh draws say of its points, ``(batch,)`` each."""

    calls: list[Call]
    correct: np.ndarray
    fresh: np.ndarray
    bench: Bench

    @property
    def attack(self) -> list[Call]:
        """The questions that kept a gradient."""
        return [call for call in self.calls if call.gradient]

    @property
    def verdict(self) -> list[Call]:
        """The questions after the last gradient."""
        last = max((k for k, call in enumerate(self.calls) if call.gradient), default=-1)
        return self.calls[last + 1 :]

    def evidence(self, **more: float) -> dict[str, float]:
        """The accuracy that is claimed, that on fresh draws, and more."""
        said = {"claimed": float(self.correct.mean()), "its points on fresh draws": float(self.fresh.mean())}
        return said | {name.replace("_", " "): value for name, value in more.items()}

    def against_fresh_draws(self, name: str, advice: str, seen: bool, **more: float) -> Check:
        """Fires at what was seen, and says whether an attack on fresh draws leaves less."""
        beside = self.bench.base().mean(0)
        evidence = self.evidence(**more) | {"under fresh draws": float(beside.mean())}
        wrong: Verdict = "attack too weak" if beyond(self.correct - beside) else "fault"
        return _judged(name, seen, wrong, advice, evidence)


def _frozen_draw(claim: Claim) -> Check:
    """RPF and CTRW: the whole attack sees one random network, the verdict another."""
    held = float(np.mean([call.held for call in claim.attack])) if claim.attack else 0.0
    others = any(not call.held for call in claim.verdict)
    advice = "the attack climbs one draw and others judge: a transfer attack; draw anew at every step"
    return claim.against_fresh_draws("frozen draw", advice, held == 1 and others, held_still=held)


def _shared_noise(claim: Claim) -> Check:
    """Learn2Perturb and WCA: noise without a batch axis is the same for all copies of an image."""
    batches = [call for call in claim.attack if call.copies > 1]
    if not batches:
        return skipped("shared noise", "no gradient was taken over copies of an image")
    copies, alike = batches[0].copies, all(call.alike for call in batches)
    advice = f"EOT({copies}) is EOT(1): copies in one batch share their noise; ask for draws, or call again"
    return claim.against_fresh_draws("shared noise", advice, alike, copies=copies, alike=float(alike))


def _gradient_path(claim: Claim) -> Check:
    """An attack under ``no_grad``, or on something else than what is judged; queries may suffice."""
    advice = "no gradient of the defense was taken: attack the whole of it, purifier included, or by BPDA"
    taken = float(len(claim.attack))
    check = claim.against_fresh_draws("gradient path", advice, taken == 0, gradients_taken=taken)
    return check if check.verdict != "fault" else Check(check.name, "ok", "", check.evidence)


def _lucky_draw(claim: Claim) -> Check:
    """A verdict by one draw, or by the best of several."""
    draws = sum(call.draws * call.rows for call in claim.verdict) / len(claim.correct)
    evidence = claim.evidence(verdict_draws=draws)
    advice = (
        "more examples survive than on fresh draws: judge every point on many, chosen before they are seen"
    )
    return _judged("lucky draw", beyond(claim.correct - claim.fresh), "fault", advice, evidence)


def _any_iterate(claim: Claim) -> Check:
    """Success wherever one iterate fooled one draw: an attacker who is told when he was lucky."""
    advice = "fewer examples survive than on fresh draws: luck counts as success; judge the final points"
    over = beyond(claim.fresh - claim.correct)
    return _judged("any iterate", over, "fault", advice, claim.evidence())


def _twin(claim: Claim) -> Check:
    """What is left of the defense if its randomness is frozen and known."""
    bench, name = claim.bench, "fixed-seed twin"
    if not can_freeze(bench.logits_fn):
        return skipped(name, "its draws cannot be frozen")
    with forked(derive(bench.seed, "twin"), bench.x.device):
        still = bench.logits_fn.freeze(1)
    known = Bench(
        still,
        bench.x,
        bench.y,
        bench.eps,
        bench.norm,
        bench.rule,
        bench.loss,
        bench.num_gradients,
        1,
        1,
        bench.seed,
    )
    left = known.base().mean(0)
    seen = bool(claim.verdict) and all(call.held for call in claim.verdict)
    advice = "one draw, held still, gives the verdict: an attacker who knows it leaves what the twin keeps"
    evidence = claim.evidence(twin_under_attack=float(left.mean()))
    return _judged(name, seen and beyond(claim.correct - left), "attack too weak", advice, evidence)


def _judged(name: str, fired: bool, wrong: Verdict, advice: str, evidence: dict[str, float]) -> Check:
    return Check(name, wrong, advice, evidence) if fired else Check(name, "ok", "", evidence)


def _claimed(said: Any, x: Inputs, eps: float, norm: Norm) -> tuple[Inputs, np.ndarray]:
    """The points and verdicts of a protocol.

    Raises:
        TypeError: points or verdicts that are no tensor.
        ValueError: something else, points outside the ball, or verdicts that are no shares.
    """
    if not isinstance(said, tuple) or len(said) != 2:
        raise ValueError(f"expected a protocol that returns (points, correct), got {type(said).__name__}")
    points = check_like(said[0], x, "points")
    if len(points) != len(x):
        raise ValueError(
            f"expected one point per example, {len(x)}, got {len(points)}; return x where none is"
        )
    far = float(lp_norm(points.detach().double() - x.double(), norm).max())
    if far > reach(eps, norm, x[0].numel(), x.dtype):
        raise ValueError(
            f"expected points within eps={eps:g} of x in the {norm:g} norm, got one at {far:.4g}; state the "
            "radius and norm of the protocol"
        )
    way = "give a bool per example, or the share of right answers where there are several"
    check_kind("correct", said[1], (Tensor, np.ndarray, list, tuple), way)
    correct = torch.as_tensor(said[1]).double()
    if correct.shape != (len(x),):
        raise ValueError(
            f"expected one verdict per example, shape ({len(x)},), got {tuple(correct.shape)}; give the "
            "share of right answers where there are several"
        )
    if not bool(((correct >= 0) & (correct <= 1)).all()):
        raise ValueError(
            f"expected verdicts in [0, 1], got {float(correct.min()):g} to {float(correct.max()):g}; {way}"
        )
    return points, correct.cpu().numpy()


def _different(rows: Tensor) -> int:
    """How many different rows there are."""
    return len(rows.flatten(1).unique(dim=0))
