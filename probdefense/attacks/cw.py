r"""Carlini and Wagner's L2 attack, with the constant searched per example or given.

Carlini and Wagner, 2017, [Towards Evaluating the Robustness of Neural
Networks](https://arxiv.org/abs/1608.04644). Adam descends

$$ \|x' - x\|_2^2 + c \max(\kappa - m(x'), 0), \qquad x' = \tfrac12 (\tanh w + 1), $$

with $m$ the margin of the wrong classes, so that every $w$ is an allowed image. The constant trades pixels
against logits, so `cw` counts $m$ in units of the spread of the logits at `x` and finds the same points
whatever the logits are multiplied by; `cw_fixed` keeps the units of its paper.
"""

import warnings
from functools import partial

import torch
from torch import Tensor

from probdefense.attacks.tools.border import attack
from probdefense.attacks.tools.gradient import input_gradient
from probdefense.attacks.tools.selection import Goal
from probdefense.attacks.tools.settle import settle, surrogate
from probdefense.attacks.tools.tradeoff import Descent, State, cheapest, hinge
from probdefense.logits.losses import predictive_margin
from probdefense.logits.rules import mean_prob
from probdefense.types import Inputs, Labels, LogitsFn, LossFn, Rule, Seed

SHRINK = 0.999
"""Pixels start this far inside the box: at exactly 0 or 1 the slope of tanh is 0 and nothing moves."""


@attack
def cw(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    num_steps: int = 100,
    num_searches: int = 9,
    step_size: float = 0.1,
    init_c: float = 1e-3,
    confidence: float = 0.0,
    loss: LossFn = predictive_margin,
    rule: Rule = mean_prob,
    target: Labels | None = None,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""Carlini and Wagner's L2 attack, the nearest wrong point, by bisection over its constant, $c$.

    Each example has its own constant and stops on its own. A random defense is solved on frozen draws
    and the points are settled on others.

    Args:
        logits_fn: What is attacked; ``samples(n)`` sets the draws that are frozen, 16 by default.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        num_steps: Gradient steps per constant, at most.
        num_searches: Constants tried.
        step_size: Adam's, in units of $w$; shorten it where the nearest point is closer than 0.1.
        init_c: First constant, in squared pixels per twentieth of the spread of the logits at `x`, which
            is about a nat; tenfold until a wrong point is found.
        confidence: $\kappa$, the margin of the wrong class in nats of the network.
        loss: $m$, positive where the decision is wrong.
        rule: The decision that must be wrong.
        target: Classes wanted instead of any wrong one.
        seed: An int, one per example, or a generator; fixes the draws of a random defense.
        max_batch: Examples at once.

    Returns:
        Wrong points, ``(batch, *event)``; `x` itself where none was found.

    Raises:
        ValueError: bad inputs or settings, or a random function that cannot be frozen.

    References:
        Carlini and Wagner, 2017, [Towards Evaluating the Robustness of Neural
        Networks](https://arxiv.org/abs/1608.04644)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> x_adv = cw(net, torch.rand(2, 4), torch.tensor([0, 1]), num_steps=5, num_searches=2)
    """
    goal = Goal(y, target, loss, rule, sure=logits_fn.stochastic)
    found, goal = cheapest(
        surrogate(logits_fn, "cw"),
        x,
        goal,
        Descent(partial(_start, shrink=SHRINK), partial(_move, step_size), _squared, 2, "cw"),
        num_steps=num_steps,
        num_searches=num_searches,
        init_c=init_c,
        confidence=confidence,
    )
    return settle(logits_fn, x, found, goal)


@attack
def cw_fixed(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    c: float,
    num_steps: int = 300,
    step_size: float = 1e-3,
    confidence: float = 0.0,
    loss: LossFn = predictive_margin,
    target: Labels | None = None,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""The protocol of the RSE paper: one given constant, few short steps, and the last point as it is.

    For reproduction only. Pixels at exactly 0 or 1 cannot move, the steps reach a distance of about
    $300 \cdot 10^{-3}$ in $w$, and nothing checks that the answer is wrong. On a random defense every
    step climbs fresh draws.

    Args:
        logits_fn: What is attacked.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        c: Weight of the hinge, in squared pixels per nat: the columns of the paper's Table 2.
        num_steps: Gradient steps.
        step_size: Adam's, in units of $w$.
        confidence: $\kappa$ in nats.
        loss: $m$, positive where the decision is wrong.
        target: Classes wanted instead of any wrong one.
        seed: An int, one per example, or a generator; fixes the draws of a random defense.
        max_batch: Examples at once.

    Returns:
        The last points, ``(batch, *event)``, wrong or not.

    Raises:
        ValueError: bad inputs or settings.

    References:
        Liu et al., 2018, [Towards Robust Neural Networks via Random Self-ensemble](https://arxiv.org/abs/1712.00673)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> x_adv = cw_fixed(net, torch.rand(2, 4), torch.tensor([0, 1]), c=0.1, num_steps=5)
    """
    stuck = float(((x == 0) | (x == 1)).float().mean())
    if stuck > 0.05:
        warnings.warn(
            f"{stuck:.0%} of the pixels are at exactly 0 or 1, where tanh is flat, and cannot move under "
            "the fixed-c protocol; use cw for the nearest wrong points",
            stacklevel=3,
        )
    goal, state = Goal(y, target, loss), _start(x, shrink=1.0)
    climbed = partial(hinge, goal, c, confidence)
    for number in range(num_steps):
        slope = input_gradient(logits_fn, state[0], climbed, where=f"cw_fixed, step {number}")
        state = _move(step_size, x, state, slope.gradient, number)
    return state[0]


def _start(x: Inputs, shrink: float) -> State:
    """Points, their $w$, and Adam's two averages."""
    w = torch.atanh(shrink * (2 * x - 1))
    return (w.tanh() + 1) / 2, w, torch.zeros_like(w), torch.zeros_like(w)


def _move(step_size: float, x: Inputs, state: State, gradient: Tensor, number: int) -> State:
    """One step of Adam down the squared distance minus what is climbed, in $w$."""
    points, w, mean, square = state
    slope = (2 * (points - x) - gradient) * 2 * points * (1 - points)
    mean, square = torch.lerp(mean, slope, 0.1), torch.lerp(square, slope.square(), 0.001)
    size = (square / (1 - 0.999 ** (number + 1))).sqrt() + 1e-8
    w = w - step_size * mean / (1 - 0.9 ** (number + 1)) / size
    return (w.tanh() + 1) / 2, w, mean, square


def _squared(delta: Tensor) -> Tensor:
    return delta.flatten(1).square().sum(1)
