"""`evaluate`: robust accuracy on fresh draws, every number with its rule, budget and interval.

Three streams of draws never meet: what an attack climbs, what the worst case is chosen on, and the
verdict. Verdict draws are keyed by (seed, example) and the same for clean inputs and every attack, so
an attack that does nothing leaves exactly the clean accuracy. Nothing is optimized here.
"""

import inspect
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from probdefense.adapters import Samples, as_logits_fn, can_freeze, counted
from probdefense.intervals import accuracy_interval
from probdefense.ops import lp_norm
from probdefense.progress import track
from probdefense.report import Report, Row
from probdefense.rng import derive, forked, hash_keys
from probdefense.rules import margins, mean_prob, single_draw, verdicts
from probdefense.types import Attack, Inputs, Labels, Logits, LogitsFn, Norm, Rule
from probdefense.validation import (
    check_classes,
    check_count,
    check_eps,
    check_inputs,
    check_labels,
    check_logits,
    check_norm,
)

ATTACK_SAMPLES = 16
"""Draws per attack call on a random defense, unless `with_draws` says otherwise."""

SELECTION_SAMPLES = 32
"""Draws on which the worst of several attacks is chosen."""

BLOCK = 10
"""Verdict draws at a time; fixed, because it decides which numbers a seed stands for."""

ROWS = 256
"""Examples at a time where draws cannot be keyed to examples; fixed for the same reason."""


class WithDraws(NamedTuple):
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

    Raises:
        ValueError: `num_samples` below 1.

    Example:
        >>> import probdefense as pd
        >>> with_draws(pd.attacks.pgd, 16).num_samples
        16
    """
    check_count("num_samples", num_samples)
    return WithDraws(attack, num_samples)


def evaluate(
    logits_fn: LogitsFn,
    data: tuple[Inputs, Labels] | Iterable[tuple[Inputs, Labels]],
    attacks: Mapping[str, Attack] | None = None,
    *,
    norm: Norm = math.inf,
    eps: float | Sequence[float] = 0.2,
    rules: Sequence[Rule] = (mean_prob, single_draw),
    num_samples: int = 50,
    seed: int = 0,
    name: str = "defense",
) -> Report:
    """Accuracy of a defense on clean inputs and under every attack, by every rule.

    Fixed-budget attacks (those that take ``eps``) run once per radius and get `norm` and the radius
    unless they fix their own. A minimum-norm point counts at a radius if it lies within it; else the
    clean input stands there. With several attacks the rows of ``"worst"`` take, for each example, the
    point with the smallest margin of the rule on draws of their own.

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

    Returns:
        A `Report`, rows ordered clean first, then by attack, radius and rule.

    Raises:
        ValueError: bad data or settings, or an attack that left the ball or the box.

    References:
        Carlini et al., 2019, [On Evaluating Adversarial Robustness](https://arxiv.org/abs/1902.06705)

    Example:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> report = evaluate(net, (torch.rand(8, 4), torch.zeros(8).long()), {"fgsm": pd.attacks.fgsm})
        >>> [(row["attack"], row["rule"]) for row in report.rows]
        [('clean', 'mean_prob'), ('clean', 'single_draw'), ('fgsm', 'mean_prob'), ('fgsm', 'single_draw')]
    """
    logits_fn = as_logits_fn(logits_fn)
    x, y = gather(data)
    radii = [float(e) for e in (eps if isinstance(eps, Sequence) else [eps])]
    _check_settings(x, y, norm, radii, rules, num_samples)
    settings = {"norm": _number(norm), "num_samples": num_samples, "seed": seed, "confidence": 0.95}
    judge = _Judge(logits_fn, x, y, tuple(rules), num_samples, seed, name, Report([], settings))
    judge.add("clean", 0.0, x, Spent())
    attacked: dict[float, dict[str, Inputs]] = {radius: {} for radius in radii}
    for label, attack in track(list((attacks or {}).items()), f"attack {name}"):
        for radius, points, spent in _attacked(logits_fn, x, y, label, attack, norm, radii, seed):
            judge.add(label, radius, points, spent)
            attacked[radius][label] = points
    if len(attacks or {}) > 1:
        for radius, by_name in attacked.items():
            judge.add_worst(radius, by_name)
    return judge.report


class Spent(NamedTuple):
    """What an attack cost: draws per call, evaluations in example x draw, and seconds."""

    attack_samples: int | None = None
    queries: int = 0
    gradients: int = 0
    seconds: float = 0.0


class _Judge(NamedTuple):
    """Gives verdicts on points, all by the same draws, and files them in the report."""

    logits_fn: LogitsFn
    x: Inputs
    y: Labels
    rules: tuple[Rule, ...]
    num_samples: int
    seed: int
    name: str
    report: Report

    def add(self, attack: str, radius: float, points: Inputs, spent: Spent) -> None:
        logits = draw_keyed(self.logits_fn, points, self.num_samples, derive(self.seed, "verdict"))
        check_classes(self.y, logits.shape[-1])
        for rule in self.rules:
            self._file(attack, radius, rule, verdicts(rule, logits, self.y), len(logits), spent)
        self.report.timing[f"{self.name}/{attack}/{radius:g}"] = spent.seconds

    def add_worst(self, radius: float, by_name: dict[str, Inputs]) -> None:
        """For each example the verdict under the attack with the smallest margin on other draws."""
        seed, names = derive(self.seed, "selection"), list(by_name)
        drawn = [draw_keyed(self.logits_fn, by_name[n], SELECTION_SAMPLES, seed) for n in names]
        for rule in self.rules:
            remaining = torch.stack([margins(rule, logits, self.y).mean(0) for logits in drawn])
            filed = [self.report.arrays[self._key(n, radius, rule)] for n in names]
            correct = torch.stack([torch.as_tensor(v) for v in filed])
            chosen = remaining.argmin(0).expand(1, *correct.shape[1:])
            worst = correct.gather(0, chosen.to(correct.device)).squeeze(0)
            num_samples = self.report.rows[0]["num_samples"]
            self._file("worst", radius, rule, worst, num_samples, Spent())

    def _key(self, attack: str, radius: float, rule: Rule) -> str:
        return f"correct/{self.name}/{attack}/{radius:g}/{rule_name(rule)}"

    def _file(
        self, attack: str, radius: float, rule: Rule, correct: Tensor, num_samples: int, spent: Spent
    ) -> None:
        array = correct.cpu().numpy()
        low, high = accuracy_interval(array, crossed=shares_draws(self.logits_fn))
        row: Row = {
            "defense": self.name,
            "attack": attack,
            "eps": radius,
            "rule": rule_name(rule),
            "accuracy": float(array.mean()),
            "low": low,
            "high": high,
            "num_examples": len(self.y),
            "num_samples": num_samples,
            "attack_samples": spent.attack_samples,
            "queries": spent.queries,
            "gradients": spent.gradients,
        }
        self.report.rows.append(row)
        self.report.arrays[self._key(attack, radius, rule)] = array


def draw_keyed(logits_fn: LogitsFn, x: Inputs, num_samples: int, seed: int) -> Logits:
    """Logits of draws that depend on (seed, example) alone, ``(samples, batch, classes)``.

    A `Defense` draws noise for each example's position and weights for all; a function that can
    freeze shares its draws; a bare callable is seeded anew for every fixed chunk of examples.
    """
    with torch.no_grad():
        if not logits_fn.stochastic:
            return _checked(torch.cat([logits_fn(part) for part in x.split(ROWS)], dim=1), x)
        blocks = []
        for start in range(0, num_samples, BLOCK):
            count, key = min(BLOCK, num_samples - start), derive(seed, start)
            if hasattr(logits_fn, "keyed"):
                ids = torch.arange(len(x), device=x.device)
                blocks.append(logits_fn.keyed(key, ids, count)(x))
            elif can_freeze(logits_fn):
                with forked(key, x.device):
                    frozen = logits_fn.freeze(count)
                blocks.append(torch.cat([frozen(part) for part in x.split(ROWS)], dim=1))
            else:
                blocks.append(_in_seeded_chunks(logits_fn, x, count, key))
        return _checked(torch.cat(blocks), x)


def _in_seeded_chunks(logits_fn: LogitsFn, x: Inputs, count: int, key: int) -> Logits:
    """For functions that cannot freeze: the same chunks and seeds for every set of points."""
    parts = []
    for number, part in enumerate(x.split(ROWS)):
        with forked(derive(key, number), x.device):
            rows: list[Tensor] = []
            while sum(len(r) for r in rows) < count:  # such a function may answer with any number
                rows.append(logits_fn(part, count))
            parts.append(torch.cat(rows)[:count])
    return torch.cat(parts, dim=1)


def shares_draws(logits_fn: LogitsFn) -> bool:
    """Whether a verdict draw is common to all examples, which makes their errors correlated."""
    return bool(logits_fn.stochastic and getattr(logits_fn, "shares_draws", can_freeze(logits_fn)))


def _attacked(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    label: str,
    attack: Attack,
    norm: Norm,
    radii: list[float],
    seed: int,
) -> Iterable[tuple[float, Inputs, Spent]]:
    """The attack's points at every radius: one run each, or one run in all without a budget."""
    takes = _parameters(attack)
    fixed = {"norm": norm} if "norm" in takes and "eps" in takes else {}
    if "eps" in takes:
        for radius in radii:
            points, spent = _run(logits_fn, x, y, label, attack, {**fixed, "eps": radius}, seed)
            _check_points(points, x, radius, norm, label)
            yield radius, points, spent
        return
    points, spent = _run(logits_fn, x, y, label, attack, {}, seed)
    _check_points(points, x, math.inf, norm, label)
    for radius in radii:
        within = lp_norm(points - x, norm) <= radius
        yield radius, torch.where(within.view(-1, *[1] * (x.dim() - 1)), points, x), spent


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


def gather(data: Any) -> tuple[Inputs, Labels]:
    """All examples of ``(x, y)``, a data set or a loader, as two tensors.

    Raises:
        TypeError: none of these.
        ValueError: no examples.
    """
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return data
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
    x: Inputs, y: Labels, norm: Norm, radii: list[float], rules: Sequence[Rule], num_samples: int
) -> None:
    check_inputs(x)
    check_labels(y, len(x))
    check_norm(norm)
    for radius in radii:
        check_eps(radius)
    check_count("num_samples", num_samples)
    if not radii or not rules:
        raise ValueError("expected at least one eps and one rule")


def _checked(logits: Logits, x: Inputs) -> Logits:
    check_logits(logits, len(x))
    return logits


def _number(norm: Norm) -> str | int:
    return "inf" if norm == math.inf else int(norm)
