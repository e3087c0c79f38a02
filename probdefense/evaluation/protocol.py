"""`evaluate`: robust accuracy on fresh draws, every number with its rule, budget and interval.

Three streams of draws never meet: what an attack climbs, what the worst case is chosen on, and the
verdict (see `prediction.drawing`). Verdict draws are the same for clean inputs and every attack, so an
attack that does nothing leaves exactly the clean accuracy. Data walk one way, chunk by chunk: examples,
points, verdicts, records, rows. Nothing is optimized here.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probdefense.evaluation import standing
from probdefense.evaluation.arrays import radii_of
from probdefense.evaluation.examples import Chunk, chunks, gather, num_chunks
from probdefense.evaluation.fingerprint import mark
from probdefense.evaluation.intervals import ESTIMANDS
from probdefense.evaluation.journal import Book
from probdefense.evaluation.points import Run, Spent, Threat, attacked, runs
from probdefense.evaluation.queries import by_queries
from probdefense.evaluation.records import Record
from probdefense.evaluation.report import Report
from probdefense.evaluation.rows import Rows
from probdefense.evaluation.standing import check_exact
from probdefense.evaluation.verdicts import Judge, rule_name
from probdefense.logits.adapters import as_logits_fn
from probdefense.logits.precision import cast
from probdefense.logits.rules import mean_prob, single_draw
from probdefense.prediction.drawing import draws_kind, is_adaptive
from probdefense.processes import Processes
from probdefense.progress import track
from probdefense.types import Attack, Data, LogitsFn, Norm, Rule
from probdefense.validation import (
    check_attack,
    check_count,
    check_eps,
    check_function,
    check_kind,
    check_member,
    check_norm,
    check_seed,
)

CHUNK_SIZE = 256
"""Examples that are attacked together."""


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
    max_queries: Sequence[int] | None = None,
    chunk_size: int = CHUNK_SIZE,
    draw_chunk: int | None = None,
    journal: str | os.PathLike[str] | None = None,
    first: int = 0,
    fabric: Any = None,
    until_broken: bool = False,
    amp: torch.dtype | None = None,
) -> Report:
    """Accuracy of a defense on clean inputs and under every attack, by every rule.

    Attacks that take ``eps`` run once per radius and get `norm` and the radius. One that fixes its own
    radius with ``partial`` runs once, and its rows name that radius. A minimum-norm attack, or any that
    takes no ``eps``, runs once: its point counts at a radius if it lies within it; else the clean input
    stands there, and `Report.curve` gives every radius. With several
    attacks the rows of ``"worst"`` take, for each example, the point with the smallest margin of the
    rule on draws of their own. A defense that adapts (`AdaptiveLogitsFn`) is replayed three times in
    stream order from the state it was found in, each replay one verdict; its stream is one chunk.

    Args:
        logits_fn: A `Defense` or any `LogitsFn`.
        data: ``(x, y)``, a data set, or a loader of such batches that keeps their order.
        attacks: By name; `with_draws` sets the draws per call (1, or 16 on a random defense).
        norm: Of the threat model.
        eps: One radius in pixels, or several, as numbers, a tensor or an array.
        rules: How draws become decisions.
        num_samples: Verdict draws.
        seed: Of attacks, selection and verdict; the report depends on nothing else.
        name: Of the defense, in the rows.
        max_queries: Budgets of the attacks that take ``max_queries``, each of which runs once per budget, as
            ``"square@100"`` for example, with rows that name it; by single answers unless `with_draws` says
            otherwise. See `queries.query_curve`.
        chunk_size: Examples that are attacked together; one chunk is in memory at a time. It decides, with
            `seed`, which draws the attacks see.
        draw_chunk: Images (rows times draws) per pass of the defense, chosen by the memory of one if None;
            it changes no draw.
        journal: A folder in which every finished chunk is kept; a rerun goes on where it ended.
        first: The number of the first example, a multiple of `chunk_size`, where the data are a shard of a
            larger set; `Report.merge` joins the reports of all shards into the report of the whole.
        fabric: A `lightning_fabric.Fabric` after ``launch()``, for many processes with the defense on their
            device: process r takes the chunks whose number is r modulo their count, and every one returns
            the same report, that of one process byte for byte.
        until_broken: Whether an example that is wrong already, without an attack or under one at the radius
            or a smaller one, is left out by later attacks: for defenses without randomness. The worst case
            stays exact; the row of an attack counts what was broken before as wrong and is ``conditional``.
        amp: ``torch.bfloat16`` to compute forward passes in it where torch deems that safe; losses and
            verdicts see float32.
        estimand: What the intervals are about: ``"population"`` or ``"test set"``, see
            `intervals.accuracy_interval`.

    Returns:
        A `Report`, rows ordered clean first, then by attack, radius and rule.

    Raises:
        ValueError: bad data or settings, an attack that fixes another norm or a larger radius, or one that
            left the ball or the box, or `until_broken` of a defense that is random or adapts.
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
    logits_fn = as_logits_fn(logits_fn)
    attacks = {} if attacks is None else attacks
    check_kind("attacks", attacks, Mapping, "give them by name, as in {'pgd': attacks.pgd}")
    attacks, budgets = by_queries(attacks, max_queries)
    num_samples, seed, norm = check_count("num_samples", num_samples), check_seed(seed), check_norm(norm)
    chunk_size = check_count("chunk_size", chunk_size)
    draw_chunk = None if draw_chunk is None else check_count("draw_chunk", draw_chunk)
    if check_count("first", first, least=0) % chunk_size:
        raise ValueError(f"expected first as a multiple of chunk_size={chunk_size}, got {first}")
    threat = Threat(norm, tuple(radii_of(eps)))
    _check_settings(threat, rules, estimand)
    runs = _all_runs(name, attacks, threat)
    at_once = chunk_size
    if is_adaptive(logits_fn):  # a stream of its own, so the setting that reports share says nothing
        data = gather(data)
        at_once = max(1, len(data[0]))
    judge = Judge(cast(logits_fn, amp), tuple(rules), num_samples, seed, selects=len(attacks) > 1)
    asked: dict[str, Any] = {
        "norm": _number(norm),
        "num_samples": num_samples,
        "seed": seed,
        "confidence": 0.95,
    }
    check_kind("until_broken", until_broken, bool, "give True or False")
    check_exact(until_broken, logits_fn, is_adaptive(logits_fn))
    asked |= {"until_broken": True} if until_broken else {}
    asked |= {} if amp is None else {"amp": str(amp).removeprefix("torch.")}
    asked |= {"estimand": estimand, "chunk_size": chunk_size, "draw_chunk": draw_chunk}
    named = {**asked, "rules": [rule_name(rule) for rule in rules]}
    book = Book.opened(journal, Processes(fabric), named, logits_fn, attacks)
    labels: list[np.ndarray] = []
    about: dict[str, Any] = {}
    for chunk in track(chunks(data, at_once, first), f"evaluate {name}", num_chunks(data, at_once)):
        chunk = chunk.on(book.processes.device)
        about = about or _about(chunk)
        labels.append(chunk.y.cpu().numpy())
        if book.takes(chunk):
            see = _see_standing if until_broken else _see_chunk
            see(book, judge._replace(kept={}), chunk, runs, threat, draw_chunk)
    report = Report([], asked | about)
    _file_examples(report, name, np.concatenate(labels), first, mark(logits_fn))
    Rows(report, name, draws_kind(logits_fn)).file(book.joined(), runs, threat)
    report.rows = [
        row | {"max_queries": budgets[row["attack"]]} if row["attack"] in budgets else row
        for row in report.rows
    ]
    for row in report.rows if until_broken else ():
        row |= {"conditional": True} if row["attack"] not in ("clean", "worst") else {}
    return report


def _see_chunk(
    book: Book, judge: Judge, chunk: Chunk, runs: list[Run], threat: Threat, draw_chunk: int | None
) -> None:
    """Writes the records of one chunk that are not there yet: of the examples, and of every run."""
    for run in [None, *runs]:
        place = ("clean", 0.0) if run is None else (run.label, run.eps)
        if book.has(place, chunk):
            continue
        if run is None:
            record = Record.of(judge.see(chunk.x, chunk.y, chunk.first), Spent())
        else:
            found = attacked(judge.logits_fn, chunk, run, threat, seed=judge.seed, draw_chunk=draw_chunk)
            seen = judge.see(found.points, chunk.y, chunk.first)
            record = Record.of(seen, found.spent, found.distance if run.eps == math.inf else None)
        book.write(place, chunk, record)


def _see_standing(
    book: Book, judge: Judge, chunk: Chunk, runs: list[Run], threat: Threat, draw_chunk: int | None
) -> None:
    """Writes the records of one chunk, of which every run needs those before it."""
    places = [("clean", 0.0), *((run.label, run.eps) for run in runs)]
    if all(book.has(place, chunk) for place in places):
        return
    for place, record in standing.records(judge, chunk, runs, threat, draw_chunk):
        book.write(place, chunk, record)


def _file_examples(report: Report, name: str, labels: np.ndarray, first: int, defense: int) -> None:
    """Files what tells the examples from others, and the defense that saw them."""
    ids = first + np.arange(len(labels))
    for kind, array in (("labels", labels), ("ids", ids), ("fingerprint", np.full_like(ids, defense))):
        report.arrays.put(array, kind, name)


def _about(chunk: Chunk) -> dict[str, Any]:
    """What else the bytes of a report depend on."""
    x = chunk.x
    return {
        "pixels": x[0].numel(),
        "dtype": str(x.dtype).removeprefix("torch."),
        "device": x.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _check_settings(threat: Threat, rules: Sequence[Rule], estimand: str) -> None:
    for radius in threat.radii:
        check_eps(radius, norm=threat.norm)
    check_member("estimand", estimand, ESTIMANDS)
    check_kind("rules", rules, (list, tuple), "give a list of rules, as in [rules.vote]")
    if not threat.radii or not rules:
        raise ValueError("expected at least one eps and one rule, got none; leave them out for the defaults")
    for rule in rules:
        check_function("every rule", rule, "logits")
    names = [rule_name(rule) for rule in rules]
    if len(set(names)) < len(names):
        raise ValueError(
            f"expected rules with different names, got {', '.join(names)}; give each a __name__ of its own"
        )


def _all_runs(name: str, attacks: Mapping[str, Attack], threat: Threat) -> list[Run]:
    """Every run of every attack; refuses what does not fit before any of them starts.

    Raises:
        TypeError: an attack that cannot be called, or a name that is no text.
        ValueError: a name that the report uses itself, or see `points.runs`.
    """
    for each in (name, *attacks):
        if not isinstance(each, str):
            raise TypeError(
                f"expected names of defenses and attacks as text, got {type(each).__name__} {each!r}; they "
                "stand in the rows of the report"
            )
        if each in ("clean", "worst") or "/" in each or not each:
            raise ValueError(
                f"expected names other than 'clean' and 'worst' and without '/', got {each!r}; the report "
                "uses these itself: take another name"
            )
    for label, attack in attacks.items():
        check_attack(attack, f"attack {label!r}")
    return [run for label, attack in attacks.items() for run in runs(label, attack, threat)]


def _number(norm: Norm) -> str | int:
    return "inf" if norm == math.inf else int(norm)
