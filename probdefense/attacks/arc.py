r"""ARC: the attack on a defense that answers with one of a few members, drawn by chance.

Dbouk and Shanbhag, 2022, [Adversarial Vulnerability of Randomized
Ensembles](https://arxiv.org/abs/2206.06737). The loss averaged over members can fall everywhere along
the way to a point that fools one of them, so its gradient stalls. ARC never averages: it walks member
by member, the one with the nearest boundary first, and keeps a step if no more members are right:

$$ \delta \leftarrow \eta \frac{\delta + \beta\, g_m}{\|\delta + \beta\, g_m\|_p}, \qquad
   g_m = \arg\max_{\|g\|_p \le 1} \langle -\nabla \text{margin}_m, g \rangle, $$

with the smallest $\beta$ that takes the step over the linearized boundary of member $m$.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from probdefense.attacks.tools.border import attack
from probdefense.attacks.tools.gradient import ask, input_gradient
from probdefense.attacks.tools.settle import surrogate
from probdefense.logits.rules import score_margin, spread
from probdefense.ops import Ball, lp_norm, per_example
from probdefense.progress import track
from probdefense.types import Inputs, Labels, Logits, LogitsFn, Norm, Seed

DUAL = {1: math.inf, 2: 2, math.inf: 1}


@attack
def arc(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    eps: float,
    norm: Norm = math.inf,
    step_size: float | None = None,
    num_steps: int = 20,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""Attack on randomized ensembles; it lowers the share of members that are right.

    That share is the accuracy of the rule `single_draw`. Every step costs gradients and forward passes
    of all members at as many points as there are members.

    Args:
        logits_fn: What is attacked: its samples are the members, equally likely. A random function is
            frozen first, on 16 draws unless ``samples(n)`` says otherwise.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        eps: Radius in pixels.
        norm: 1, 2 or ``inf``.
        step_size: $\eta$ in pixels; $\epsilon / 4$ by default.
        num_steps: Walks over all members.
        seed: An int, one per example, or a generator; fixes the draws of a random defense.
        max_batch: Examples at once.

    Returns:
        Points of the ball, ``(batch, *event)``.

    Raises:
        ValueError: bad inputs or settings, or a random function that cannot be frozen.

    References:
        Dbouk and Shanbhag, 2022, [Adversarial Vulnerability of Randomized
        Ensembles](https://arxiv.org/abs/2206.06737)

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.defenses.bayesian(torch.nn.Linear(4, 3))
        >>> x_adv = arc(defense.samples(2), torch.rand(2, 4), torch.tensor([0, 1]), eps=0.1)
    """
    members, ball, points = surrogate(logits_fn, "arc"), Ball(x, eps, norm), x.clone()
    length = ball.radius / 4 if step_size is None else torch.full_like(ball.radius, step_size)
    right = _share_right(members, points, y)
    for number in track(range(num_steps), "arc"):
        rows = right.nonzero().flatten()
        if len(rows) == 0:
            break
        near = ball.take(rows)
        boundaries = _boundaries(members, points[rows], y[rows], near, number)
        points[rows], right[rows] = _walk(
            members, points[rows], right[rows], y[rows], boundaries, near, length[rows]
        )
    return points


class Boundaries(NamedTuple):
    """Where every member would err, to first order: ``distance`` (members, batch), the rest with events.

    ``normal`` has unit dual norm and ``direction`` unit norm; both point to the error.
    """

    distance: Tensor
    normal: Tensor
    direction: Tensor


def _boundaries(members: LogitsFn, points: Inputs, y: Labels, ball: Ball, number: int) -> Boundaries:
    """The nearest boundary of every member, from one copy of the points for each."""
    answers = ask(members, points)
    count, unit = len(answers), spread(answers).flatten()
    unit = torch.where(unit > 0, unit, 1.0)

    def behind(logits: Logits) -> Tensor:
        own = logits.unflatten(1, (count, len(y))).diagonal().movedim(-1, 0)
        return -score_margin(own, y).flatten() / unit

    copies = points.repeat(count, *[1] * (points.dim() - 1))
    slope = input_gradient(members, copies, behind, where=f"arc, step {number}")
    size = lp_norm(slope.gradient, DUAL[ball.norm]).clamp_min(1e-30)
    shape = (count, len(y))
    return Boundaries(
        (-slope.value / size).view(shape),
        (slope.gradient / per_example(size, copies)).unflatten(0, shape),
        ball.steepest(slope.gradient, copies).unflatten(0, shape),
    )


def _walk(
    members: LogitsFn,
    points: Inputs,
    right: Tensor,
    y: Labels,
    boundaries: Boundaries,
    ball: Ball,
    length: Tensor,
) -> tuple[Inputs, Tensor]:
    """One step per example: the members one after another, nearest boundary first.

    The first move that makes no more members right is kept, later ones only if fewer are.
    """
    rows = torch.arange(len(y), device=y.device)
    ranked = boundaries.distance.masked_fill(boundaries.distance <= 0, torch.inf).argsort(0)
    move, best, moved = torch.zeros_like(points), points, torch.zeros_like(right, dtype=torch.bool)
    for member in ranked:
        distance, normal, direction = (part[member, rows] for part in boundaries)
        trial = move + per_example(_share(move, distance, normal, ball, length), move) * direction
        trial = length * trial / per_example(lp_norm(trial, ball.norm), trial).clamp_min(1e-30)
        candidate = ball.project(points + trial)
        reached = _share_right(members, candidate, y)
        kept = (reached < right) | ((reached == right) & ~moved)
        keep = per_example(kept, points)
        best, move = torch.where(keep, candidate, best), torch.where(keep, trial, move)
        right, moved = torch.minimum(reached, right), moved | kept
    return best, right


def _share(move: Tensor, distance: Tensor, normal: Tensor, ball: Ball, length: Tensor) -> Tensor:
    r"""How much of a member's direction to add to the move so that a step crosses its boundary.

    With $\|m + \beta g\| \le \|m\| + \beta$ the step gains at least
    $\eta (\langle n, m \rangle + \beta) / (\|m\| + \beta)$; $\beta$ makes that the distance. Out of
    reach, the direction counts as much as the move.
    """
    size, gain = lp_norm(move, ball.norm), (normal * move).flatten(1).sum(1)
    step = length.flatten()
    needed = (distance * size - step * gain) / (step - distance).clamp_min(1e-12)
    share = torch.where(step > distance, 1.05 * needed.clamp_min(0.0), size)
    return torch.where(size > 0, share, 1.0)


def _share_right(members: LogitsFn, points: Inputs, y: Labels) -> Tensor:
    """The share of members that are right, ``(batch,)``."""
    return (score_margin(ask(members, points), y) > 0).to(points.dtype).mean(0)
