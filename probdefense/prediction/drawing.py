"""Draws for verdicts: keyed by (seed, example), the same for clean inputs and every attack.

A `Defense` draws noise for each example's position and weights for all; a function that can freeze
shares its draws; a bare callable is seeded anew for every fixed chunk of examples; a defense that
adapts at test time is replayed from the state it was found in, with seeds that no attack has seen.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from probdefense.logits.adapters import Samples, can_freeze, with_options
from probdefense.rng import derive, forked
from probdefense.types import Inputs, Logits, LogitsFn
from probdefense.validation import check_answer

BLOCK = 10
"""Draws at a time; fixed, because it decides which numbers a seed stands for."""

ROWS = 256
"""Examples at a time where draws cannot be keyed to examples; fixed for the same reason."""

REPLAYS = 3
"""How often a defense that adapts goes through the inputs."""


def draw_groups(
    logits_fn: LogitsFn,
    x: Inputs,
    num_samples: int,
    seed: int,
    first: int = 0,
    kept: dict[int, LogitsFn] | None = None,
) -> list[Logits]:
    """Logits in groups that are judged apart: one of all draws, or one per replay of an adaptive defense.

    Args:
        logits_fn: What is judged.
        x: ``(batch, *event)``, in stream order.
        num_samples: Draws, per replay for an adaptive defense that takes the number.
        seed: Of the draws.
        first: The number of the first example: noise belongs to the numbers, weights to the seed.
        kept: Where the drawn functions of these examples stay, for other points of theirs.

    Returns:
        Groups ``(samples, batch, classes)``, detached.
    """
    if is_adaptive(logits_fn):
        return [_checked(logits, x) for logits in _replayed(logits_fn, x, num_samples, seed)]
    return [draw_keyed(logits_fn, x, num_samples, seed, first, kept)]


def draw_keyed(
    logits_fn: LogitsFn,
    x: Inputs,
    num_samples: int,
    seed: int,
    first: int = 0,
    kept: dict[int, LogitsFn] | None = None,
) -> Logits:
    """Logits of draws that depend on (seed, example) alone, ``(samples, batch, classes)``."""
    with torch.no_grad():
        if not logits_fn.stochastic:
            return _checked(torch.cat([logits_fn(part) for part in x.split(ROWS)], dim=1), x)
        blocks = []
        for start in range(0, num_samples, BLOCK):
            count, key = min(BLOCK, num_samples - start), derive(seed, start)
            if hasattr(logits_fn, "keyed"):
                drawn = {} if kept is None else kept
                if key not in drawn:
                    ids = first + torch.arange(len(x), device=x.device)
                    drawn[key] = logits_fn.keyed(key, ids, count)
                blocks.append(drawn[key](x))
            elif can_freeze(logits_fn):
                with forked(key, x.device):
                    frozen = logits_fn.freeze(count)
                blocks.append(torch.cat([frozen(part) for part in x.split(ROWS)], dim=1))
            else:
                blocks.append(_in_seeded_chunks(logits_fn, x, count, derive(key, first)))
        return _checked(torch.cat(blocks), x)


class Keyed:
    """A function whose every call has draws of its own, keyed by (seed, number of the call).

    This is what an attack is handed: whatever the number of threads or restarts, the same call gets the
    same draws. What it asks for at once is computed in passes of at most `draw_chunk` images, which changes
    no draw.

    Args:
        logits_fn: What is asked.
        seed: Of the draws.
        draw_chunk: Images (rows times draws) per pass, chosen by the memory of one if None.
    """

    def __init__(self, logits_fn: LogitsFn, seed: int, draw_chunk: int | None = None):
        self.logits_fn, self.seed, self.draw_chunk, self.calls = logits_fn, seed, draw_chunk, 0

    @property
    def stochastic(self) -> bool:
        """As the function itself."""
        return self.logits_fn.stochastic

    def __call__(self, x: Inputs, num_samples: int | None = None, **options: Any) -> Logits:
        """``(samples, batch, classes)``."""
        key = self._next()
        if hasattr(self.logits_fn, "drawn"):
            recompute = options.pop("recompute", False)
            size = len(x) if recompute and self.draw_chunk is None else self.draw_chunk
            return self.logits_fn.drawn(x, num_samples, seed=key, max_batch=size, **options)
        with forked(key, x.device):
            return self.logits_fn(x, num_samples)

    @property
    def freeze(self) -> Any:
        """The function with its randomness fixed, of the next call's draws; None if it cannot."""
        return self._freeze if can_freeze(self.logits_fn) else None

    def samples(self, num_samples: int, draws: str = "independent") -> Samples:
        """The same function with a fixed number of draws."""
        return with_options(self, num_samples, draws)

    def _freeze(self, num_samples: int) -> LogitsFn:
        with forked(self._next()):
            return self.logits_fn.freeze(num_samples)

    def _next(self) -> int:
        self.calls += 1
        return derive(self.seed, self.calls)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "logits_fn":
            raise AttributeError(name)
        return getattr(self.logits_fn, name)


def draws_kind(logits_fn: LogitsFn) -> str:
    """``"none"`` without randomness, ``"shared"`` if a draw is common to all examples, or ``"independent"``.

    Shared draws make the errors of examples correlated. So does adaptation, which carries a state.
    """
    if is_adaptive(logits_fn):
        return "shared"
    if not logits_fn.stochastic:
        return "none"
    return "shared" if getattr(logits_fn, "shares_draws", can_freeze(logits_fn)) else "independent"


def is_adaptive(logits_fn: Any) -> bool:
    """Whether the function adapts at test time: it can ``respond``, tell its ``state`` and ``restore``."""
    return all(callable(getattr(logits_fn, name, None)) for name in ("respond", "state", "restore"))


def _replayed(adaptive: Any, x: Inputs, num_samples: int, seed: int) -> Iterator[Logits]:
    """The answers of every replay; the state found is there again afterwards."""
    takes_count = adaptive.stochastic and "num_samples" in inspect.signature(adaptive.respond).parameters
    options = {"num_samples": num_samples} if takes_count else {}
    found = adaptive.state()
    try:
        for replay in range(REPLAYS):
            adaptive.restore(found)
            yield adaptive.respond(x, seed=derive(seed, "replay", replay), **options).detach()
    finally:
        adaptive.restore(found)


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


def _checked(logits: Logits, x: Inputs) -> Logits:
    return check_answer(logits, len(x), "the draws of a verdict")
