r"""Auto-PGD: projected gradient ascent with momentum that sets its own step.

Croce and Hein, 2020, [Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks](https://arxiv.org/abs/2003.01690); for L1, 2021, [Mind the
box](https://arxiv.org/abs/2103.01208). The step starts long and is halved at checkpoints where the
climb has stalled, and the climb then goes on from its best point:

$$ z_t = \Pi(x_t + \eta_t d_t), \qquad
   x_{t+1} = \Pi\big(x_t + \alpha (z_t - x_t) + (1 - \alpha)(x_t - x_{t-1})\big) $$

Under random draws a best value is a lucky one. A random defense is therefore judged by its mean loss
between checkpoints, over all their draws, and the climb goes on from where it is.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probdefense.attacks.tools.border import attack
from probdefense.attacks.tools.gradient import Gradient, ask, input_gradient, input_jacobian
from probdefense.attacks.tools.selection import Best, Goal, check_active_set, remaining_margin
from probdefense.logits.losses import expected_cross_entropy
from probdefense.logits.rules import mean_prob
from probdefense.ops import Ball, is_class, lp_norm, per_example
from probdefense.rng import Stream
from probdefense.types import Inputs, Labels, Logits, LogitsFn, LossFn, Norm, Rule, Seed

MOMENTUM = 0.75
"""Share of the new direction in a step."""

DUAL = {1: math.inf, 2: 2, math.inf: 1}
"""The norm of a slope per step of that norm."""

RISES = 0.75
"""Share of the steps since the last checkpoint that must have raised the loss."""


@attack
def apgd(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    eps: float,
    norm: Norm = math.inf,
    num_steps: int = 100,
    num_restarts: int = 1,
    num_targets: int | None = None,
    loss: LossFn = expected_cross_entropy,
    rule: Rule = mean_prob,
    repeats: int = 1,
    active_set: bool = False,
    target: Labels | None = None,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""Auto-PGD: the step halves where the climb stalls, from $2\,\epsilon$.

    For L1 it starts at $\epsilon$.
    Without randomness the answer is the iterate with the smallest margin; on a random defense it is
    the last one, and restarts are compared on fresh draws.

    Args:
        logits_fn: What is attacked.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        eps: Radius in pixels.
        norm: 1, 2 or ``inf``.
        num_steps: Gradient steps per run.
        num_restarts: Runs, each from a random point of the ball.
        num_targets: Instead of alike restarts, runs toward each of so many likely wrong classes, those
            with the smallest gap of logits over its slope first; any error counts.
        loss: What is climbed, over the draws of one call; `dlr` has a form of its own for targets.
        rule: The decision rule by which points are compared.
        repeats: Calls whose gradients are averaged in every step, when memory is short.
        active_set: Whether an example leaves once it is misclassified; for functions without
            randomness only.
        target: Classes wanted; climbed toward, and nothing else counts.
        seed: An int, one per example, or a generator; fixes every random number of the attack.
        max_batch: Examples at once.

    Returns:
        Points of the ball, ``(batch, *event)``.

    Raises:
        ValueError: bad inputs or settings, an active set on a random function, or both kinds of targets.

    References:
        Croce and Hein, 2020, [Reliable evaluation of adversarial robustness with an ensemble of
        diverse parameter-free attacks](https://arxiv.org/abs/2003.01690)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> x_adv = apgd(net, torch.rand(2, 4), torch.tensor([0, 1]), eps=0.1, num_steps=5, seed=0)
    """
    check_active_set(active_set, logits_fn)
    if num_targets is not None and target is not None:
        raise ValueError("expected num_targets or target, got both; num_targets chooses the classes itself")
    goal, rng, ball, best = Goal(y, target, loss, rule), Stream.of(seed, x), Ball(x, eps, norm), Best(x)
    aims = [goal] * num_restarts
    if num_targets is not None:
        aims = [goal._replace(target=likely) for likely in _easy_targets(logits_fn, x, y, num_targets, norm)]
    for aim in aims:
        climb = _begin(ball, ball.start(rng), goal, aim)
        if active_set:
            climb = climb.take(best.margin > 0)
        climb = _run(logits_fn, climb, best, num_steps, repeats, active_set)
        if logits_fn.stochastic and len(aims) == 1:
            return climb.points
        if len(climb.rows):
            wanted = climb.goal
            margin = remaining_margin(logits_fn, climb.points, wanted.y, rule, wanted.target)
            best.offer(climb.points, margin, climb.rows)
    return best.x


class _Climb(NamedTuple):
    """Where every example is on its way up, and what its step is decided by."""

    rows: Tensor
    ball: Ball
    goal: Goal
    aim: Goal
    points: Inputs
    previous: Inputs
    slope: Tensor
    top: Inputs
    top_slope: Tensor
    top_value: Tensor
    last_value: Tensor
    rises: Tensor
    total: Tensor
    mark: Tensor
    halved: Tensor
    step: Tensor
    keep: Tensor

    def take(self, rows: Tensor) -> "_Climb":
        """The climbs of some of the examples."""
        parts = [part[rows] if isinstance(part, Tensor) else part.take(rows) for part in self]
        return _Climb(*parts)  # type: ignore[arg-type]


def _begin(ball: Ball, start: Inputs, goal: Goal, aim: Goal) -> _Climb:
    none = torch.zeros(len(start), dtype=start.dtype, device=start.device)
    low, size = torch.full_like(none, -torch.inf), float(start[0].numel())
    return _Climb(
        rows=torch.arange(len(start), device=start.device),
        ball=ball,
        goal=goal,
        aim=aim,
        points=start,
        previous=start,
        slope=torch.zeros_like(start),
        top=start,
        top_slope=torch.zeros_like(start),
        top_value=low,
        last_value=-low,
        rises=none,
        total=none,
        mark=none + size if ball.norm == 1 else low,
        halved=torch.zeros_like(none, dtype=torch.bool),
        step=ball.radius.flatten() * (1.0 if ball.norm == 1 else 2.0),
        keep=none + 0.2 * size,
    )


def _run(
    logits_fn: LogitsFn, climb: _Climb, best: Best, num_steps: int, repeats: int, active_set: bool
) -> _Climb:
    """One climb; without randomness every iterate is offered as it is met, but for the last."""
    periods = _periods(num_steps, climb.ball.norm)
    for number in range(num_steps):
        if len(climb.rows) == 0:
            break
        slope = input_gradient(
            logits_fn, climb.points, climb.aim.climbed, repeats=repeats, where=f"apgd, step {number}"
        )
        climb = _seen(climb, slope)
        if not logits_fn.stochastic:
            remaining = climb.goal.remaining(slope.logits)
            best.offer(climb.points, remaining, climb.rows)
            if active_set:
                climb = climb.take(remaining > 0)
        if number in periods:
            climb = _adjusted(climb, periods[number], logits_fn.stochastic)
        climb = _moved(climb, 1.0 if number == 0 or climb.ball.norm == 1 else MOMENTUM)
    return climb


def _seen(climb: _Climb, slope: Gradient) -> _Climb:
    """Takes note of the gradient and the loss at the points."""
    higher = slope.value > climb.top_value
    return climb._replace(
        slope=slope.gradient,
        top=_pick(higher, climb.points, climb.top),
        top_slope=_pick(higher, slope.gradient, climb.top_slope),
        top_value=torch.maximum(slope.value, climb.top_value),
        last_value=slope.value,
        rises=climb.rises + (slope.value > climb.last_value),
        total=climb.total + slope.value,
    )


def _adjusted(climb: _Climb, period: int, stochastic: bool) -> _Climb:
    """Shorter steps where the climb has stalled; without randomness it goes on from its best point."""
    if climb.ball.norm == 1:
        back, climb = _sparser(climb, climb.points if stochastic else climb.top)
    elif stochastic:
        mean = climb.total / period
        back = mean <= climb.mark
        climb = climb._replace(mark=mean, step=climb.step * torch.where(back, 0.5, 1.0))
    else:
        back = (climb.rises < RISES * period) | (~climb.halved & (climb.top_value <= climb.mark))
        climb = climb._replace(
            mark=climb.top_value, halved=back, step=climb.step * torch.where(back, 0.5, 1.0)
        )
    none = torch.zeros_like(climb.total)
    climb = climb._replace(rises=none, total=none)
    if stochastic:
        return climb
    return climb._replace(
        points=_pick(back, climb.top, climb.points),
        previous=_pick(back, climb.top, climb.previous),
        slope=_pick(back, climb.top_slope, climb.slope),
    )


def _sparser(climb: _Climb, points: Inputs) -> tuple[Tensor, _Climb]:
    """For L1: steps on fewer coordinates than have moved, long again where those became fewer."""
    moved = (points != climb.ball.x).flatten(1).sum(1).to(climb.step.dtype)
    fewer, longest = moved < 0.95 * climb.mark, climb.ball.radius.flatten()
    step = torch.where(fewer, longest, torch.maximum(climb.step / 1.5, longest / 10))
    return fewer, climb._replace(mark=moved, keep=moved / 1.5, step=step)


def _moved(climb: _Climb, share: float) -> _Climb:
    """A step along the gradient, mixed with the last one."""
    ball, points = climb.ball, climb.points
    direction = ball.steepest(climb.slope, points, climb.keep)
    ahead = ball.project(points + per_example(climb.step, points) * direction)
    if share < 1:
        ahead = ball.project(points + share * (ahead - points) + (1 - share) * (points - climb.previous))
    return climb._replace(points=ahead, previous=points)


def _pick(rows: Tensor, some: Tensor, others: Tensor) -> Tensor:
    return torch.where(per_example(rows, some), some, others)


def _periods(num_steps: int, norm: Norm) -> dict[int, int]:
    """The steps at which the step is adjusted, with the number of steps since the last time.

    A tenth of the way for L1; else 22 % of the way, then 3 % less every time, down to 6 %.
    """
    ends, share = [0.0], 0.1 if norm == 1 else 0.22
    while ends[-1] + share < 1:
        ends.append(ends[-1] + share)
        share = share if norm == 1 else max(share - 0.03, 0.06)
    steps = sorted({math.ceil(end * num_steps) for end in ends})
    return {step: step - before for before, step in itertools.pairwise(steps)}


def _easy_targets(logits_fn: LogitsFn, x: Inputs, y: Labels, count: int, norm: Norm) -> Sequence[Labels]:
    r"""Wrong classes, each ``(batch,)``, the nearest first: by the gap of the logits over its slope.

    Of the likely ones, which are twice as many, because the most likely need not be the nearest: Melamed et
    al., 2024, [MALT Powers Up Adversarial Attacks](https://arxiv.org/abs/2407.02240).
    """
    likely = _likely_wrong(logits_fn, x, y, 2 * count)

    def ahead(logits: Logits) -> Tensor:
        mean = logits.mean(0)
        return mean.gather(1, likely) - mean.gather(1, y.unsqueeze(1))

    slopes = input_jacobian(logits_fn, x, ahead, where="apgd, the order of targets")
    steepness = torch.stack([lp_norm(slope, DUAL[norm]) for slope in slopes.gradient])
    distance = (-slopes.value / steepness.clamp_min(1e-30)).T.nan_to_num(torch.inf)
    # Where classes are ruled out, the true one may tie with them among the likely.
    order = distance.masked_fill(likely == y.unsqueeze(1), torch.inf).argsort(dim=1, stable=True)
    return likely.gather(1, order)[:, :count].unbind(1)


def _likely_wrong(logits_fn: LogitsFn, x: Inputs, y: Labels, count: int) -> Labels:
    """The most likely wrong classes, ``(batch, count)``, most likely first."""
    scores = mean_prob(ask(logits_fn, x))
    truth = is_class(y, scores.shape[-1])
    return scores.masked_fill(truth, -torch.inf).topk(min(count, scores.shape[-1] - 1)).indices
