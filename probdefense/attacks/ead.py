r"""Elastic-net attack: sparse perturbations by an L1 penalty beside the squared L2.

Chen et al., 2018, [EAD: Elastic-Net Attacks to Deep Neural Networks via Adversarial
Examples](https://arxiv.org/abs/1709.04114). Accelerated proximal descent of

$$ \|\delta\|_2^2 + \beta \|\delta\|_1 + c \max(\kappa - m(x + \delta), 0), $$

whose proximal step sets every change smaller than $\beta$ to exactly zero.
"""

from functools import partial

from torch import Tensor

from probdefense.attacks.tools.border import attack
from probdefense.attacks.tools.selection import Goal
from probdefense.attacks.tools.settle import settle, surrogate
from probdefense.attacks.tools.tradeoff import Descent, State, cheapest
from probdefense.logits.losses import predictive_margin
from probdefense.logits.rules import mean_prob
from probdefense.types import Inputs, Labels, LogitsFn, LossFn, Rule, Seed


@attack
def ead(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    beta: float = 1e-2,
    num_steps: int = 100,
    num_searches: int = 9,
    step_size: float = 1e-2,
    init_c: float = 1e-3,
    confidence: float = 0.0,
    loss: LossFn = predictive_margin,
    rule: Rule = mean_prob,
    target: Labels | None = None,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""Elastic-net attack, the wrong point nearest in L1, by bisection over its constant, $c$.

    Each example has its own constant and stops on its own. A random defense is solved on frozen draws
    and the points are settled on others.

    Args:
        logits_fn: What is attacked; ``samples(n)`` sets the draws that are frozen, 16 by default.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        beta: $\beta$, weight of the L1 norm and threshold of the proximal step, in pixels.
        num_steps: Gradient steps per constant, at most.
        num_searches: Constants tried.
        step_size: Of the first step, in pixels; it falls with the square root of what is left.
        init_c: First constant, per twentieth of the spread of the logits at `x`, which is about a nat;
            tenfold until a wrong point is found.
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
        Chen et al., 2018, [EAD: Elastic-Net Attacks to Deep Neural Networks via Adversarial
        Examples](https://arxiv.org/abs/1709.04114)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> x_adv = ead(net, torch.rand(2, 4), torch.tensor([0, 1]), num_steps=5, num_searches=2)
    """
    goal = Goal(y, target, loss, rule, sure=logits_fn.stochastic)
    found, goal = cheapest(
        surrogate(logits_fn, "ead"),
        x,
        goal,
        Descent(_start, partial(_move, step_size, beta, num_steps), partial(_elastic, beta), 1, "ead"),
        num_steps=num_steps,
        num_searches=num_searches,
        init_c=init_c,
        confidence=confidence,
    )
    return settle(logits_fn, x, found, goal)


def _start(x: Inputs) -> State:
    """The extrapolated points and the last proximal ones."""
    return x, x


def _move(
    step_size: float, beta: float, num_steps: int, x: Inputs, state: State, gradient: Tensor, number: int
) -> State:
    """A gradient step, the proximal one (small changes become zero), and the extrapolation."""
    points, last = state
    step = step_size * (1 - number / num_steps) ** 0.5
    delta = points + step * (gradient - 2 * (points - x)) - x
    shrunk = delta.sign() * (delta.abs() - beta).clamp_min(0.0)
    proximal = (x + shrunk).clamp(0.0, 1.0)
    ahead = proximal + number / (number + 3) * (proximal - last)
    return ahead.clamp(0.0, 1.0), proximal


def _elastic(beta: float, delta: Tensor) -> Tensor:
    flat = delta.flatten(1)
    return flat.square().sum(1) + beta * flat.abs().sum(1)
