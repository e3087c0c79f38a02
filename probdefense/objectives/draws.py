"""A defense whose training forwards use given draws: what an attack saw, or what copies share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from probdefense.types import Draws, Inputs, Labels, Logits, Objective, Step


class InTurn:
    """A defense that hands out given draws one after the other, again and again, and keeps the steps.

    Args:
        defense: A `Defense`, or a view like this one.
        draws: At least one joint draw.
    """

    def __init__(self, defense: Any, draws: Sequence[Draws]):
        self._defense, self._draws = defense, draws
        self.used, self.steps = 0, list[Step]()

    def draw(self, x: Inputs) -> Draws:
        """The next draw."""
        self.used += 1
        return self._draws[(self.used - 1) % len(self._draws)]

    def step(self, x: Inputs, y: Labels, draws: Draws | None = None) -> Step:
        """The training forward at the next draw, or at the given one."""
        self.steps.append(self._defense.step(x, y, draws=self.draw(x) if draws is None else draws))
        return self.steps[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._defense, name)


def over_draws(objective: Objective, view: InTurn, count: int, *batch: Tensor, **options: Any) -> Tensor:
    """The mean of an objective, evaluated until it has used `count` draws of the view."""
    losses = [objective(view, *batch, **options)]
    while 0 < view.used < count:
        losses.append(objective(view, *batch, **options))
    return sum(losses[1:], losses[0]) / len(losses)


def detached(draws: Draws) -> Draws:
    """The same values, through which nothing is trained."""
    return {name: value.detach() for name, value in draws.items()}


def logits_at(defense: Any, draws: Sequence[Draws], x: Inputs) -> Logits:
    """Logits of given draws, ``(samples, batch, classes)``."""
    return torch.cat([defense.at(draw)(x) for draw in draws])
