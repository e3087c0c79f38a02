"""`evaluate`: robust accuracy on fresh draws, every number with its rule, budget and interval.

Three streams of draws never meet: what an attack climbs, what the worst case is chosen on, and the
verdict (see `prediction.drawing`). Verdict draws are the same for clean inputs and every attack, so an
attack that does nothing leaves exactly the clean accuracy. Nothing is optimized here.
"""

import inspect
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from probdefense.evaluation.intervals import ESTIMANDS
from probdefense.evaluation.report import Report, Row, proportion
from probdefense.logits.adapters import Samples, as_logits_fn, counted
from probdefense.logits.rules import margins, mean_prob, single_draw, verdicts
from probdefense.ops import entropy, lp_norm, per_example
from probdefense.prediction.drawing import ROWS, draw_groups, draws_kind
from probdefense.progress import track
from probdefense.rng import derive, forked, hash_keys
from probdefense.types import Attack, Data, Inputs, Labels, LogitsFn, Norm, Rule
from probdefense.validation import (
    check_classes,
    check_count,
    check_eps,
    check_inputs,
    check_labels,
    check_member,
    check_norm,
)

ATTACK_SAMPLES = 16
"""Draws per attack call on a random defense, unless `with_draws` says otherwise."""

SELECTION_SAMPLES = 32
"""Draws on which the worst of several attacks is chosen."""


@dataclass(frozen=True)
class WithDraws:
    """An attack and the number of draws per call with which it sees a random defense."""

    attack: Attack
    num_samples: int

    def __call__(self, logits_fn: LogitsFn, x: Inputs, y: Labels, **options: Any) -> Inputs:
        """The attack on the function with that number of draws."""
        return self.attack(Samples(as_logits_fn(logits_fn), self.num_samples), x, y, **options)


def with_draws(attack: Attack, num_samples: int) -> WithDraws:
    """An attack that sees a random defense with a given number of draws per call.

    Args:
        attack: Any attack.
        num_samples: 1 for one draw per step, more for expectation over transformation.

    Returns:
        An attack with the options of `attack`.

    Raises:
        ValueError: `num_samples` below 1.

    Examples:
        >>> import probdefense as pd
        >>> with_draws(pd.attacks.pgd, 16).num_samples
        16
    """
    check_count("num_samples", num_samples)
    return WithDraws(attack, num_samples)


def evaluate(
    logits_fn: LogitsFn,
    data: Data,
    attacks: Mapping[str, Attack] | None = None,
    *,
    norm: Norm = math.inf,
    eps: float | Sequence[float] = 0.2,
    rules: Sequence[Rule] = (mean_prob, single_draw),
    num_samples: int = 50,
    seed: int = 0,
    name: str = "defense",
    estimand: str = "population",
) -> Report:
    """Accuracy of a defense on clean inputs and under every attack, by every rule.

    Fixed-budget attacks (those that take ``eps``) run once per radius and get `norm` and the radius
    unless they fix their own. A minimum-norm attack runs once: its point counts at a radius if it lies
    within it; else the clean input stands there, and `Report.curve` gives every radius. With several
    attacks the rows of ``"worst"`` take, for each example, the point with the smallest margin of the
    rule on draws of their own. A defense that adapts (`AdaptiveLogitsFn`) is replayed three times in
    stream order from the state it was found in, each replay one verdict.

    Args:
        logits_fn: A `Defense` or any `LogitsFn`.
        data: ``(x, y)``, a data set, or a loader of such batches.
        attacks: By name; `with_draws` sets the draws per call (1, or 16 on a random defense).
        norm: Of the threat model.
        eps: One radius in pixels, or several.
        rules: How draws become decisions.
        num_samples: Verdict draws.
        seed: Of attacks, selection and verdict; the report depends on nothing else.
        name: Of the defense, in the rows.
        estimand: What the intervals are about: ``"population"`` or ``"test set"``, see
            `intervals.accuracy_interval`.

    Returns:
        A `Report`, rows ordered clean first, then by attack, radius and rule.

    Raises:
        ValueError: bad data or settings, or an attack that left the ball or the box.

    References:
        Carlini et al., 2019, [On Evaluating Adversarial Robustness](https://arxiv.org/abs/1902.06705)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> report = evaluate(net, (torch.rand(8, 4), torch.zeros(8).long()), {"fgsm": pd.attacks.fgsm})
        >>> [(row["attack"], row["rule"]) for row in report.rows]
        [('clean', 'mean_prob'), ('clean', 'single_draw'), ('fgsm', 'mean_prob'), ('fgsm', 'single_draw')]
    """
    logits_fn = as_logits_fn(logits_fn)
    x, y = gather(data)
    radii = list(dict.fromkeys(float(e) for e in (eps if isinstance(eps, Sequence) else [eps])))
    _check_settings(x, y, norm, radii, rules, num_samples, estimand)
    _check_names([name, *(attacks or {})])
    settings = {"norm": _number(norm), "num_samples": num_samples, "seed": seed, "confidence": 0.95}
    report = Report([], settings | {"estimand": estimand}, {f"labels/{name}": y.cpu().numpy()})
    judge = _Judge(logits_fn, y, tuple(rules), num_samples, seed, name, report)
    clean = judge.see(x)
    judge.add("clean", 0.0, clean, Spent())
    attacked: dict[float, dict[str, Inputs]] = {radius: {} for radius in radii}
    for label, attack in track(list((attacks or {}).items()), f"attack {name}"):
        for radius, points, spent in _attacked(logits_fn, x, y, label, attack, norm, radii, seed):
            seen = judge.see(points)
            if radius < math.inf:
                judge.add(label, radius, seen, spent)
                attacked[radius][label] = points
                continue
            distance = judge.keep_distance(label, seen, lp_norm(points - x, norm))
            for reach in radii:
                judge.add(label, reach, seen.where(distance <= reach, clean), spent)
                attacked[reach][label] = torch.where(per_example(distance <= reach, x), points, x)
    if len(attacks or {}) > 1:
        for radius, by_name in attacked.items():
            judge.add_worst(radius, by_name)
    return report


class Spent(NamedTuple):
    """What an attack cost: draws per call, evaluations in example x draw, and seconds."""

    attack_samples: int | None = None
    queries: int = 0
    gradients: int = 0
    seconds: float = 0.0


class _Seen(NamedTuple):
    """What the verdict draws say of a set of points.

    ``correct`` (verdicts, batch) by rule; ``log_probs`` (batch, classes) of the mean probability;
    ``expected_entropy`` (batch,) in nats; ``num_samples`` draws in all.
    """

    correct: dict[str, Tensor]
    log_probs: Tensor
    expected_entropy: Tensor
    num_samples: int

    def where(self, mask: Tensor, other: "_Seen") -> "_Seen":
        """What is seen of some examples here, of the rest there."""
        correct = {rule: torch.where(mask, here, other.correct[rule]) for rule, here in self.correct.items()}
        log_probs = torch.where(mask.unsqueeze(1), self.log_probs, other.log_probs)
        expected = torch.where(mask, self.expected_entropy, other.expected_entropy)
        return _Seen(correct, log_probs, expected, self.num_samples)


class _Judge(NamedTuple):
    """Gives verdicts on points, all by the same draws, and files them in the report."""

    logits_fn: LogitsFn
    y: Labels
    rules: tuple[Rule, ...]
    num_samples: int
    seed: int
    name: str
    report: Report

    def see(self, points: Inputs) -> _Seen:
        groups = draw_groups(self.logits_fn, points, self.num_samples, derive(self.seed, "verdict"))
        check_classes(self.y, groups[0].shape[-1])
        correct = {
            rule_name(rule): torch.cat([verdicts(rule, group, self.y) for group in groups])
            for rule in self.rules
        }
        logits = torch.cat(groups)
        return _Seen(correct, mean_prob(logits), entropy(logits.log_softmax(-1)).mean(0), len(logits))

    def keep(self, attack: str, radius: float, seen: _Seen) -> None:
        """Keeps what is known of every example."""
        place = f"{self.name}/{attack}/{radius:g}"
        self.report.arrays |= {
            **{f"correct/{place}/{rule}": _array(correct) for rule, correct in seen.correct.items()},
            f"log_probs/{place}": _array(seen.log_probs),
            f"expected_entropy/{place}": _array(seen.expected_entropy),
        }

    def keep_distance(self, attack: str, seen: _Seen, distance: Tensor) -> Tensor:
        """Keeps how far the points of a minimum-norm attack are, and the verdicts there."""
        self.keep(attack, math.inf, seen)
        self.report.arrays[f"distance/{self.name}/{attack}"] = _array(distance)
        return distance

    def add(self, attack: str, radius: float, seen: _Seen, spent: Spent) -> None:
        self.keep(attack, radius, seen)
        for rule in seen.correct:
            self._file(attack, radius, rule, seen.num_samples, spent)
        self.report.timing[f"{self.name}/{attack}/{radius:g}"] = spent.seconds

    def add_worst(self, radius: float, by_name: dict[str, Inputs]) -> None:
        """For each example the verdict under the attack with the smallest margin on other draws."""
        seed, names = derive(self.seed, "selection"), list(by_name)
        drawn = [draw_groups(self.logits_fn, by_name[n], SELECTION_SAMPLES, seed) for n in names]
        for rule in self.rules:
            left = torch.stack([torch.cat([margins(rule, g, self.y) for g in d]).mean(0) for d in drawn])
            filed = [f"correct/{self.name}/{n}/{radius:g}/{rule_name(rule)}" for n in names]
            correct = torch.stack([torch.as_tensor(self.report.arrays[place]) for place in filed])
            chosen = left.argmin(0).cpu().expand(1, *correct.shape[1:])
            place = f"correct/{self.name}/worst/{radius:g}/{rule_name(rule)}"
            self.report.arrays[place] = correct.gather(0, chosen).squeeze(0).numpy()
            self._file("worst", radius, rule_name(rule), self.report.rows[0]["num_samples"], Spent())

    def _file(self, attack: str, radius: float, rule: str, num_samples: int, spent: Spent) -> None:
        """Adds the row of an array of verdicts."""
        array = self.report.arrays[f"correct/{self.name}/{attack}/{radius:g}/{rule}"]
        draws = draws_kind(self.logits_fn)
        row: Row = {
            "defense": self.name,
            "attack": attack,
            "eps": radius,
            "rule": rule,
            **proportion(array, draws, self.report.settings["estimand"]),
            "num_examples": len(self.y),
            "num_samples": num_samples,
            "draws": draws,
            "attack_samples": spent.attack_samples,
            "queries": spent.queries,
            "gradients": spent.gradients,
        }
        self.report.rows.append(row)


def _attacked(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    label: str,
    attack: Attack,
    norm: Norm,
    radii: list[float],
    seed: int,
) -> Iterator[tuple[float, Inputs, Spent]]:
    """The attack's points at every radius, or in one run without a budget, radius infinity."""
    takes = _parameters(attack)
    fixed = {"norm": norm} if "norm" in takes and "eps" in takes else {}
    runs: list[tuple[float, dict[str, Any]]] = [(math.inf, {})]
    if "eps" in takes:
        runs = [(radius, {**fixed, "eps": radius}) for radius in radii]
    for radius, options in runs:
        points, spent = _run(logits_fn, x, y, label, attack, options, seed)
        _check_points(points, x, radius, norm, label)
        yield radius, points, spent


def _run(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    label: str,
    attack: Attack,
    options: dict[str, Any],
    seed: int,
) -> tuple[Inputs, Spent]:
    num_samples = attack.num_samples if isinstance(attack, WithDraws) else ATTACK_SAMPLES
    attack = attack.attack if isinstance(attack, WithDraws) else attack
    key = derive(seed, "attack", label)
    if "seed" in _parameters(attack):
        options = {**options, "seed": hash_keys(key, torch.arange(len(x), device=x.device))}
    cost, start = counted(logits_fn), time.perf_counter()
    seen = cost.samples(num_samples) if hasattr(cost, "samples") else Samples(cost, num_samples)
    with forked(key, x.device):
        points = attack(seen, x, y, **options)
    seconds = time.perf_counter() - start
    drawn = num_samples if logits_fn.stochastic else 1
    return points.detach(), Spent(drawn, cost.queries, cost.gradients, seconds)


def _parameters(attack: Attack) -> set[str]:
    """The keywords that an attack takes and that its user has not fixed with ``partial``."""
    if isinstance(attack, WithDraws):
        return _parameters(attack.attack)
    preset = attack.keywords if isinstance(attack, partial) else {}
    return set(inspect.signature(attack).parameters) - set(preset)


def _check_points(points: Inputs, x: Inputs, radius: float, norm: Norm, label: str) -> None:
    """Refuses points that no attack may return.

    Raises:
        ValueError: another shape, NaN, outside [0, 1] or outside the ball.
    """
    if points.shape != x.shape:
        raise ValueError(f"attack {label!r} returned shape {tuple(points.shape)}, expected {tuple(x.shape)}")
    if not bool(torch.isfinite(points).all()) or float(points.min()) < 0 or float(points.max()) > 1:
        raise ValueError(f"attack {label!r} returned points outside the box [0, 1]; clamp them")
    size = lp_norm(points - x, norm)
    if bool((size > radius * (1 + 1e-5) + 1e-6).any()):
        raise ValueError(
            f"attack {label!r} left the ball: it returned a perturbation of norm {float(size.max()):.4g}, "
            f"expected at most eps={radius:g} in the {_number(norm)} norm; project its points"
        )


def gather(data: Data) -> tuple[Inputs, Labels]:
    """All examples of ``(x, y)``, a data set or a loader, as two tensors.

    Raises:
        TypeError: none of these.
        ValueError: no examples.
    """
    if isinstance(data, tuple) and len(data) == 2:
        x, y = data
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return x, y
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size=ROWS)
    if not isinstance(data, Iterable):
        raise TypeError(f"expected (x, y), a data set or a loader of batches, got {type(data).__name__}")
    batches = [(x, y) for x, y in data]
    if not batches:
        raise ValueError("expected at least one batch (x, y), got an empty loader")
    return torch.cat([x for x, _ in batches]), torch.cat([torch.as_tensor(y) for _, y in batches])


def rule_name(rule: Rule) -> str:
    """The name under which a rule appears in a report."""
    return getattr(rule, "__name__", type(rule).__name__)


def _check_settings(
    x: Inputs,
    y: Labels,
    norm: Norm,
    radii: list[float],
    rules: Sequence[Rule],
    num_samples: int,
    estimand: str,
) -> None:
    check_inputs(x)
    check_labels(y, len(x))
    check_norm(norm)
    for radius in radii:
        check_eps(radius)
    check_count("num_samples", num_samples)
    check_member("estimand", estimand, ESTIMANDS)
    if not radii or not rules:
        raise ValueError("expected at least one eps and one rule")


def _check_names(names: Sequence[str]) -> None:
    """Refuses names that the report uses itself."""
    for name in names:
        if name in ("clean", "worst") or "/" in name:
            raise ValueError(f"expected names other than 'clean' and 'worst' and without '/', got {name!r}")


def _array(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()


def _number(norm: Norm) -> str | int:
    return "inf" if norm == math.inf else int(norm)
