"""Early exit: an example that is wrong already is not attacked again.

Without randomness a verdict is final: whatever later attacks find, the worst case of an example that one
point has broken is wrong. So rows of the worst case stay what they would be, at a fraction of the gradients.
The row of an attack then counts an example as wrong too where an attack before it, or no attack at all, has
broken it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from probdefense.evaluation.examples import Chunk
from probdefense.evaluation.points import Run, Spent, Threat, attacked, configuration
from probdefense.evaluation.records import Record
from probdefense.evaluation.verdicts import Judge, Seen
from probdefense.types import LogitsFn


class Broken(NamedTuple):
    """Examples ``(batch,)`` that are wrong by every rule at a radius, and what was seen of them."""

    eps: float
    mask: Tensor
    seen: Seen


def check_exact(until_broken: bool, logits_fn: LogitsFn, adaptive: bool) -> None:
    """Refuses an early exit where a verdict is not final.

    Raises:
        ValueError: a function that is random or adapts.
    """
    if until_broken and (logits_fn.stochastic or adaptive):
        raise ValueError(
            "expected until_broken=False for a defense that is random or adapts, got True: one wrong verdict "
            "does not make the worst case wrong; freeze the defense, or let every attack run"
        )


def records(
    judge: Judge, chunk: Chunk, runs: list[Run], threat: Threat, draw_chunk: int | None
) -> Iterator[tuple[tuple[str, float], Record]]:
    """The records of a chunk by attack and radius, clean first; every run attacks what still stands."""
    clean = judge.see(chunk.x, chunk.y, chunk.first)
    yield ("clean", 0.0), Record.of(clean, Spent())
    broken = [Broken(0.0, _wrong(clean), clean)]
    for run in runs:
        known = [each for each in broken if each.eps <= run.eps] if _may_skip(run, chunk) else []
        rows = (
            ~torch.stack([torch.zeros_like(broken[0].mask), *(each.mask for each in known)]).any(0)
        ).nonzero()
        points, spent, distance = chunk.x.clone(), Spent(1), None
        if len(rows):
            found = attacked(
                judge.logits_fn,
                chunk.take(rows.flatten()),
                run,
                threat,
                seed=judge.seed,
                draw_chunk=draw_chunk,
            )
            points[rows.flatten()], spent = found.points, found.spent
            distance = found.distance if not _may_skip(run, chunk) and run.eps == float("inf") else None
        seen = judge.see(points, chunk.y, chunk.first)
        for each in reversed(known):
            seen = each.seen.where(each.mask, seen)
        broken += [Broken(run.eps, _wrong(seen), seen)] if run.eps < float("inf") else []
        yield (run.label, run.eps), Record.of(seen, spent, distance)


def _wrong(seen: Seen) -> Tensor:
    """Which examples are wrong by every rule in every verdict, ``(batch,)``."""
    return ~torch.stack([correct.any(0) for correct in seen.correct.values()]).any(0)


def _may_skip(run: Run, chunk: Chunk) -> bool:
    """Whether some of the examples can be left out: the run has a radius, and no setting for each of them."""
    fixed = configuration(run.attack)[1].values()
    each = any(isinstance(value, Tensor) and value.dim() and len(value) == len(chunk.x) for value in fixed)
    return run.eps < float("inf") and not each
