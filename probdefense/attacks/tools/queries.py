"""What an attacker without gradients has: answers, each draw of each example being one query.

Random directions, finite differences and comparisons are built on this one count, so a budget means
the same in every attack, and the draws over which a random defense is averaged are paid for.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from probdefense.attacks.tools.gradient import ask
from probdefense.attacks.tools.selection import Goal
from probdefense.attacks.tools.settle import HALVINGS, HELD_OUT_DRAWS, STRIDES
from probdefense.logits.adapters import can_freeze
from probdefense.ops import per_example
from probdefense.types import Inputs, Logits, LogitsFn

NARROWEST, WIDEST = 1e-3, 0.5
"""Steps of finite differences, in pixels: above rounding, and still within the box."""

PROBES, PROBE_DRAWS = 8, 4
"""Directions, and single draws of each, from which slope and noise are measured."""


LONGEST = 1e6
"""What is climbed may be infinite where classes are ruled out; differences need a number."""


class Queries:
    """A function that answers at most `max_queries` times per example, counted in draws.

    The first query is `x` itself; it tells how many draws an answer has. It cannot be frozen: what it
    knows of the defense are answers.

    Args:
        logits_fn: What is attacked.
        x: ``(batch, *event)``.
        goal: What is wanted, and the loss that is climbed over the draws of one answer.
        max_queries: Forward evaluations per example, every draw counting as one.
        num_samples: Draws per answer; as many as the function gives by default.
        frozen: Whether to fix the draws of the defense all the same, which an outsider could not.

    Raises:
        ValueError: ``frozen=True`` on a function that cannot be frozen.
    """

    def __init__(
        self,
        logits_fn: LogitsFn,
        x: Inputs,
        goal: Goal,
        max_queries: int,
        *,
        num_samples: int | None = None,
        frozen: bool = False,
    ):
        self.logits_fn, self.max_queries = logits_fn, max_queries
        self.num_samples, self.spent, self.random = num_samples, 0, logits_fn.stochastic
        first = self(x)
        self.draws, self.goal = len(first), goal.measured(first)
        if frozen and logits_fn.stochastic:
            if not can_freeze(logits_fn):
                raise ValueError(
                    "expected another defense, got one that draws anew: frozen=True needs a defense that can "
                    "freeze its draws; leave frozen out"
                )
            self.logits_fn = logits_fn.freeze(self.draws)

    @property
    def stochastic(self) -> bool:
        """Whether two answers about the same point may differ."""
        return self.logits_fn.stochastic

    @property
    def freeze(self) -> Any:
        """None: an outsider cannot hold the randomness of a defense."""
        return None

    def __call__(self, x: Inputs, num_samples: int | None = None) -> Logits:
        """One answer about one point of every example, ``(samples, batch, classes)``."""
        return self._ask(x.unsqueeze(0), num_samples)

    def values(self, points: Inputs, num_samples: int | None = None) -> Tensor:
        """What is climbed, by one answer about each: ``(points, batch, *event) -> (points, batch)``."""
        logits = self._ask(points, num_samples)
        climbed = self._goal(points).climbed(logits).clamp(-LONGEST, LONGEST)
        return climbed.to(points.dtype).view(points.shape[:2])

    def wrong(self, points: Inputs) -> Tensor:
        """Whether one answer about each point is the error wanted, ``(points, batch)``."""
        return (self._goal(points).remaining(self._ask(points)) <= 0).view(points.shape[:2])

    def rounds(self, points: int, reserve: int = 0) -> int:
        """How often the rest of the budget, less a reserve, pays for `points` points per example.

        Raises:
            ValueError: not once.
        """
        cost, left = points * self.draws, self.max_queries - self.spent - reserve
        if left < cost:
            raise ValueError(
                f"expected more, got too few: max_queries={self.max_queries} does not pay for one step; "
                f"{self.spent + cost + reserve} are needed with {self.draws} draws per answer: raise it or "
                "ask for fewer draws"
            )
        return left // cost

    @property
    def settling(self) -> int:
        """The most queries per example that `settle` can take."""
        return (STRIDES + HALVINGS) * (HELD_OUT_DRAWS if self.random else self.draws)

    def _ask(self, points: Inputs, num_samples: int | None = None) -> Logits:
        logits = ask(self.logits_fn, points.flatten(0, 1), num_samples or self.num_samples)
        self.spent += len(logits) * len(points)
        return logits

    def _goal(self, points: Inputs) -> Goal:
        count, batch = points.shape[:2]
        return self.goal.take(torch.arange(batch, device=points.device).repeat(count))


def both_ways(
    queries: Queries, x: Inputs, directions: Tensor, width: Tensor | float, num_samples: int | None = None
) -> tuple[Tensor, Tensor]:
    """What is climbed ahead and behind along every direction, ``(n, batch)`` each, at valid images."""
    points = torch.cat([x + width * directions, x - width * directions]).clamp(0.0, 1.0)
    ahead, behind = queries.values(points, num_samples).chunk(2)
    return ahead, behind


def slope_along(ahead: Tensor, behind: Tensor, directions: Tensor, width: Tensor | float) -> Tensor:
    r"""The gradient from differences alone, $\frac1n \sum_k \frac{F(x + h u_k) - F(x - h u_k)}{2h} u_k$.

    Args:
        ahead: $F(x + h u_k)$, ``(n, batch)``.
        behind: $F(x - h u_k)$, ``(n, batch)``.
        directions: $u$, ``(n, batch, *event)``.
        width: $h$ in pixels, broadcastable against ``(batch, *event)``.
    """
    rise = (ahead - behind).view(*ahead.shape, *[1] * (directions.dim() - 2))
    return (rise / (2 * width) * directions).mean(0)


def fitted_width(queries: Queries, x: Inputs, directions: Tensor) -> Tensor:
    r"""The step at which the answers of a difference differ twice as much by the step as by noise.

    A difference over $2h$ of a random function has variance $\propto \mathrm{Var}[F] / h^2$: the step
    that suits a plain network finds only noise. Noise and slope are measured with a wide step; without
    noise the narrowest step is right.

    Args:
        queries: What is asked; it pays for the measurement.
        x: ``(batch, *event)``.
        directions: A few of the kind that will be used, ``(n, batch, *event)``.

    Returns:
        One step per example in pixels, ``(batch, 1, ...)``.
    """
    if not queries.stochastic:
        return torch.full_like(per_example(x.flatten(1)[:, 0], x), NARROWEST)
    draws = [both_ways(queries, x, directions, WIDEST, 1) for _ in range(PROBE_DRAWS)]
    rise = torch.stack([ahead - behind for ahead, behind in draws])
    noise = rise.var(0).mean(0)
    slope = (rise.mean(0).square().mean(0) - noise / PROBE_DRAWS).clamp_min(1e-12)
    return per_example((2 * WIDEST * (noise / queries.draws / slope).sqrt()).clamp(NARROWEST, WIDEST), x)


def random_directions(draw: Callable[..., Tensor], count: int, like: Inputs) -> Tensor:
    """Directions ``(count, batch, *event)`` drawn by a method of a `Stream`, keyed per example."""
    return draw((count, *like.shape[1:]), like.dtype).transpose(0, 1)
