"""`evaluate`: robust accuracy on fresh draws, every number with its rule, budget and interval.

Three streams of draws never meet: what an attack climbs, what the worst case is chosen on, and the
verdict (see `prediction.drawing`). Verdict draws are the same for clean inputs and every attack, so an
attack that does nothing leaves exactly the clean accuracy. Data walk one way: examples, points,
verdicts, rows. Nothing is optimized here.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from probdefense.evaluation.arrays import radii_of
from probdefense.evaluation.examples import gather
from probdefense.evaluation.intervals import ESTIMANDS
from probdefense.evaluation.points import Threat, attacked, runs
from probdefense.evaluation.report import Report
from probdefense.evaluation.rows import Candidate, Rows
from probdefense.evaluation.verdicts import Judge, rule_name
from probdefense.logits.adapters import as_logits_fn
from probdefense.logits.rules import mean_prob, single_draw
from probdefense.prediction.drawing import draws_kind
from probdefense.progress import track
from probdefense.types import Attack, Data, Inputs, Labels, LogitsFn, Norm, Rule
from probdefense.validation import (
    check_count,
    check_eps,
    check_inputs,
    check_labels,
    check_member,
    check_norm,
)


def evaluate(
    logits_fn: LogitsFn,
    data: Data,
    attacks: Mapping[str, Attack] | None = None,
    *,
    norm: Norm = math.inf,
    eps: float | Sequence[float] | Tensor = 0.2,
    rules: Sequence[Rule] = (mean_prob, single_draw),
    num_samples: int = 50,
    seed: int = 0,
    name: str = "defense",
    estimand: str = "population",
) -> Report:
    """Accuracy of a defense on clean inputs and under every attack, by every rule.

    Attacks that take ``eps`` run once per radius and get `norm` and the radius. One that fixes its own
    radius with ``partial`` runs once, and its rows name that radius. A minimum-norm attack, or any that
    takes no ``eps``, runs once: its point counts at a radius if it lies within it; else the clean input
    stands there, and `Report.curve` gives every radius. With several
    attacks the rows of ``"worst"`` take, for each example, the point with the smallest margin of the
    rule on draws of their own. A defense that adapts (`AdaptiveLogitsFn`) is replayed three times in
    stream order from the state it was found in, each replay one verdict.

    Args:
        logits_fn: A `Defense` or any `LogitsFn`.
        data: ``(x, y)``, a data set, or a loader of such batches.
        attacks: By name; `with_draws` sets the draws per call (1, or 16 on a random defense).
        norm: Of the threat model.
        eps: One radius in pixels, or several, as numbers, a tensor or an array.
        rules: How draws become decisions.
        num_samples: Verdict draws.
        seed: Of attacks, selection and verdict; the report depends on nothing else.
        name: Of the defense, in the rows.
        estimand: What the intervals are about: ``"population"`` or ``"test set"``, see
            `intervals.accuracy_interval`.

    Returns:
        A `Report`, rows ordered clean first, then by attack, radius and rule.

    Raises:
        ValueError: bad data or settings, an attack that fixes another norm or a larger radius, or one that
            left the ball or the box.
        TypeError: an attack that cannot be called, or radii that are no numbers.

    References:
        Carlini et al., 2019, [On Evaluating Adversarial Robustness](https://arxiv.org/abs/1902.06705)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> report = evaluate(net, (torch.rand(8, 4), torch.zeros(8).long()), {"fgsm": pd.attacks.fgsm})
        >>> [(row["attack"], row["rule"]) for row in report.rows]
        [('clean', 'mean_prob'), ('clean', 'single_draw'), ('fgsm', 'mean_prob'), ('fgsm', 'single_draw')]
    """
    logits_fn, attacks = as_logits_fn(logits_fn), attacks or {}
    x, y = gather(data)
    threat = Threat(norm, tuple(radii_of(eps)))
    _check_settings(x, y, threat, rules, num_samples, estimand)
    _check_attacks(name, attacks, threat)
    settings = {"norm": _number(norm), "num_samples": num_samples, "seed": seed, "confidence": 0.95}
    settings |= {"estimand": estimand, "pixels": x[0].numel(), "dtype": str(x.dtype).removeprefix("torch.")}
    rows = Rows(Report([], settings), name, draws_kind(logits_fn))
    rows.report.arrays.put(y.cpu().numpy(), "labels", name)
    judge = Judge(logits_fn, y, tuple(rules), num_samples, seed)
    clean = judge.see(x)
    rows.file_clean(clean)
    offered: dict[float, list[Candidate]] = {radius: [] for radius in threat.radii}
    for label, attack in track(list(attacks.items()), f"attack {name}"):
        for found in attacked(logits_fn, x, y, label, attack, threat, seed):
            seen = judge.see(found.points)
            for radius, candidate in rows.file_found(label, found, seen, clean, x, threat):
                offered[radius].append(candidate)
    if len(attacks) > 1:
        for radius, candidates in offered.items():
            if not candidates:  # every attack fixed a larger radius
                continue
            chosen = judge.worst([candidate.points for candidate in candidates])
            rows.file_worst(radius, candidates, chosen)
    return rows.report


def _check_settings(
    x: Inputs, y: Labels, threat: Threat, rules: Sequence[Rule], num_samples: int, estimand: str
) -> None:
    check_inputs(x)
    check_labels(y, len(x))
    check_norm(threat.norm)
    for radius in threat.radii:
        check_eps(radius)
    check_count("num_samples", num_samples)
    check_member("estimand", estimand, ESTIMANDS)
    if not threat.radii or not rules:
        raise ValueError("expected at least one eps and one rule, got none")
    names = [rule_name(rule) for rule in rules]
    if len(set(names)) < len(names):
        raise ValueError(f"expected rules with different names, got {', '.join(names)}")


def _check_attacks(name: str, attacks: Mapping[str, Attack], threat: Threat) -> None:
    """Refuses names that the report uses itself, and attacks that do not fit, before any of them runs."""
    for each in (name, *attacks):
        if each in ("clean", "worst") or "/" in each:
            raise ValueError(f"expected names other than 'clean' and 'worst' and without '/', got {each!r}")
    for label, attack in attacks.items():
        if not callable(attack):
            raise TypeError(f"expected attack {label!r} as a function, got {type(attack).__name__}")
        runs(label, attack, threat)


def _number(norm: Norm) -> str | int:
    return "inf" if norm == math.inf else int(norm)
