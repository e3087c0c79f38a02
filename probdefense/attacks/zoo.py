r"""Zeroth-order optimization: Carlini and Wagner's attack with coordinate-wise finite differences.

Chen et al., 2017, [ZOO](https://arxiv.org/abs/1708.03999). Every step picks some pixels at random,
takes the slope of the objective along each from two answers, and moves them by Adam:

$$ \min_{x' \in [0,1]^d} \|x' - x\|_2^2 + c \max(-\ell(x'), 0), \qquad
   \hat g_i = 2 (x'_i - x_i) - c \frac{\ell(x' + h e_i) - \ell(x' - h e_i)}{2h} $$

On a random defense a difference over $h = 10^{-4}$, the paper's, is noise; here $h$ is fitted to it.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from probdefense.attacks.tools.adam import Adam
from probdefense.attacks.tools.border import attack
from probdefense.attacks.tools.queries import PROBES, Queries, both_ways, fitted_width, slope_along
from probdefense.attacks.tools.selection import Closest, Goal
from probdefense.attacks.tools.settle import settle
from probdefense.logits.losses import predictive_margin
from probdefense.logits.rules import mean_prob
from probdefense.ops import per_example
from probdefense.progress import track
from probdefense.rng import Stream
from probdefense.types import Inputs, Labels, LogitsFn, LossFn, Rule, Seed


@attack
def zoo(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    c: float | None = None,
    init_c: float = 1.0,
    num_searches: int | None = None,
    num_coordinates: int = 32,
    learning_rate: float = 0.05,
    h: float | None = None,
    max_queries: int = 10_000,
    loss: LossFn = predictive_margin,
    rule: Rule = mean_prob,
    frozen: bool = False,
    target: Labels | None = None,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""Zeroth-order optimization, the nearest wrong point in L2, from answers alone.

    Pixels are clamped to the box instead of squeezed through a tanh, under which those at exactly 0
    or 1 could never move.

    Args:
        logits_fn: What is attacked.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        c: $c$ fixed, one run, in squared pixels per twentieth of the spread of the logits at `x`, which is
            about a nat; searched per example by default.
        init_c: Where the search starts; it grows tenfold until a run succeeds, then bisects.
        num_searches: Runs of the search; by default as many, from 1 to 4, as move every pixel 8 times each.
        num_coordinates: Pixels moved per step, two queries each.
        learning_rate: Of Adam, in pixels.
        h: $h$ in pixels; by default the step at which the slope stands out from the noise of the
            defense, measured at `x`.
        max_queries: Forward evaluations per example over all runs, every draw counting as one.
        loss: $\ell$, zero on the boundary.
        rule: The decision that must be wrong.
        frozen: Whether the attacker knows the randomness of the defense and holds its draws fixed.
        target: Classes wanted instead of any wrong one.
        seed: An int, one per example, or a generator; fixes every random number of the attack.
        max_batch: Examples at once.

    Returns:
        Wrong points, ``(batch, *event)``; `x` itself where none was found.

    Raises:
        ValueError: bad inputs or settings, or a budget below one step.

    References:
        Chen et al., 2017, [ZOO: Zeroth Order Optimization Based Black-box Attacks to Deep Neural
        Networks without Training Substitute Models](https://arxiv.org/abs/1708.03999)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> x_adv = zoo(net, torch.rand(2, 4), torch.tensor([0, 1]), max_queries=500)
    """
    rng, goal, closest = Stream.of(seed, x), Goal(y, target, loss, rule), Closest(x, 2)
    queries = Queries(logits_fn, x, goal, max_queries, num_samples=None if frozen else 1, frozen=frozen)
    count = min(num_coordinates, x[0].numel())
    width = fitted_width(queries, x, _pixels(rng, min(PROBES, count), x)) if h is None else h
    num_steps = queries.rounds(2 * count, reserve=queries.settling)
    most = max(1, min(4, num_steps * count // (8 * x[0].numel())))
    num_runs = 1 if c is not None else num_searches or most
    weight = torch.full((len(x),), init_c if c is None else c, dtype=x.dtype, device=x.device)
    low, high = torch.zeros_like(weight), torch.full_like(weight, torch.inf)
    for _ in track(range(num_runs), "zoo"):
        found = _descend(queries, closest, weight, num_steps // num_runs, count, width, learning_rate, rng)
        low, high = torch.where(found, low, weight), torch.where(found, weight, high)
        weight = torch.where(high < torch.inf, (low + high) / 2, 10 * weight)
    goal = queries.goal._replace(sure=logits_fn.stochastic)
    return settle(logits_fn if frozen else queries, x, closest.x, goal)


def _descend(
    queries: Queries,
    closest: Closest,
    weight: Tensor,
    num_steps: int,
    count: int,
    width: Tensor | float,
    learning_rate: float,
    rng: Stream,
) -> Tensor:
    """One run from `x`: offers its wrong points, and tells for which examples there were any."""
    x, adam = closest.start, Adam(closest.start)
    points, found = x, torch.zeros_like(weight, dtype=torch.bool)
    for _ in range(num_steps):
        pixels = _pixels(rng, count, x)
        ahead, behind = both_ways(queries, points, pixels, width)
        wrong = torch.cat([ahead, behind]).mean(0) > 0  # more answers than a decision would ask for
        closest.offer(points, wrong)
        found |= wrong
        slope = count * slope_along(ahead, behind, pixels, width)
        slope = 2 * (points - x) - per_example(weight * ~wrong, x) * slope
        points = (points - learning_rate * adam.step(slope, pixels.any(0))).clamp(0.0, 1.0)
    return found


def _pixels(rng: Stream, count: int, x: Inputs) -> Tensor:
    """Unit vectors along different random pixels, ``(count, batch, *event)``."""
    size = x[0].numel()
    chosen = rng.uniform((size,), x.dtype).topk(count).indices
    return one_hot(chosen, size).to(x.dtype).transpose(0, 1).reshape(count, *x.shape)
