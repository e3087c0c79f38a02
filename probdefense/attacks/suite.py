r"""The suite: several attacks in order of cost, each on the examples that still stand.

In the manner of AutoAttack (Croce and Hein, 2020, [Reliable evaluation of adversarial robustness with an
ensemble of diverse parameter-free attacks](https://arxiv.org/abs/2003.01690)), made for defenses that
answer at random. There one lucky draw says nothing, so an example leaves only when a verdict is wrong
with 99 % confidence, by draws that no attack has climbed:

$$ \bar m + 2.33\, s_m \le 0, \qquad m = \text{the margin of the rule on held-out draws} $$
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probdefense.attacks.apgd import apgd
from probdefense.attacks.fmn import fmn
from probdefense.attacks.pgd import ascend, pgd
from probdefense.attacks.square import square
from probdefense.attacks.tools.border import attack
from probdefense.attacks.tools.gradient import ask
from probdefense.attacks.tools.selection import SELECTION_DRAWS, Best, Goal
from probdefense.attacks.tools.settle import HALVINGS, HELD_OUT_DRAWS, STRIDES, held_out, surrogate
from probdefense.attacks.transfer import transfer
from probdefense.attacks.worst_of import run
from probdefense.logits.adapters import Samples, as_logits_fn, can_freeze
from probdefense.logits.losses import dlr, margin, predictive_margin, probability_margin
from probdefense.logits.rules import mean_prob
from probdefense.ops import Ball, lp_norm, per_example
from probdefense.progress import track
from probdefense.rng import Stream
from probdefense.types import Attack, Inputs, Labels, Logits, LogitsFn, LossFn, Norm, Rule, Seed
from probdefense.validation import check_count, check_norm

TARGETS = 2
"""Wrong classes that are climbed toward."""

ROUNDS = 10
"""So often at most the stages with gradients run once more, on what rounding has left."""

LEAST = 10
"""Steps or answers that a stage needs to be worth its place."""


@attack
def suite(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    eps: float,
    norm: Norm = math.inf,
    budget: int = 1000,
    rule: Rule = mean_prob,
    target: Labels | None = None,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""PGD on the mean network, one draw a step, APGD on the margin of many draws, targeted, FMN, Square.

    The mean network comes first because its points break most of a random defense at a sixteenth of the
    cost of averaging, and Square last because it needs no gradients: where it still finds points, the
    defense hides its gradients. On a random defense one draw a step is climbed with momentum on a linear
    loss, and many on the margin of the mean probability, which listens to the draws that are undecided:
    beside plain EOT these left 1.5 and 1.6 points less on noise, 3.2 and 7.0 on dropout, and no more beyond
    the interval on transforms and an ensemble (``benchmarks/selective.py``). Without randomness it is a usual
    suite with an active set. An image that stands gets its whole budget, and not what others leave of theirs,
    because no point may depend on the rest of the batch.

    Args:
        logits_fn: What is attacked; the suite chooses the draws per call itself.
        x: ``(batch, *event)`` in [0, 1].
        y: True classes, ``(batch,)``.
        eps: Radius in pixels.
        norm: 1 (without Square), 2 or ``inf``.
        budget: Forward evaluations per image at most, every draw counting as one and the judge's
            included; nearly all of them with a gradient. `least_budget` tells the smallest.
        rule: The decision that must be wrong.
        target: Classes wanted; nothing else counts.
        seed: An int, one per example, or a generator; fixes every random number of the attacks.
        max_batch: Examples at once.

    Returns:
        For every example the point with the smallest margin on held-out draws, ``(batch, *event)``.

    Raises:
        ValueError: bad inputs or settings, or a budget below ten steps of every attack.

    References:
        Croce and Hein, 2020, [Reliable evaluation of adversarial robustness with an ensemble of
        diverse parameter-free attacks](https://arxiv.org/abs/2003.01690)

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.defenses.rse(pd.models.small_cnn())
        >>> x_adv = suite(defense, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), eps=0.1, seed=0)
    """
    rng, ball, best, judge = Stream.of(seed, x), Ball(x, eps, norm), Best(x), held_out(logits_fn)
    rows, width = torch.arange(len(x), device=x.device), len(ask(logits_fn, x[:1], 1))
    stages = _stages(logits_fn, norm, width, target is not None)
    judging = HELD_OUT_DRAWS if logits_fn.stochastic else width
    counts = _counts(stages, budget, judging * (len(stages) + 1) + width)
    clean = ask(judge, x)
    goal = Goal(y, target, rule=rule, sure=logits_fn.stochastic).measured(clean)

    def standing(points: Inputs, logits: Logits) -> Tensor:
        doubt = goal.take(rows).remaining(logits)
        best.offer(points, doubt, rows)
        return rows[doubt > 0]

    rows, left = standing(x, clean), budget - judging - width
    plan = list(zip(stages, counts, strict=True))
    again = [each for each in plan if each[0].again] * ROUNDS
    for number, (stage, most) in enumerate(track([*plan, *again], "suite")):
        if len(rows) == 0:
            break
        count = min(most, (left - stage.fixed - judging) // stage.each)
        if count < min(most, LEAST):
            continue
        left -= stage.fixed + stage.each * count + judging
        one, function = partial(stage.attack, **{stage.unit: count}), Samples(logits_fn, stage.draws)
        options: dict[str, Any] = {"eps": ball.take(rows).eps, "norm": norm}
        if target is not None:
            options["target"] = target[rows]
        key = rng.take(rows).split(stage.name if number < len(plan) else f"{stage.name} {number}")
        points = run(one, function, x[rows], y[rows], key, options)
        rows = standing(points, ask(judge, points))
    return best.x


def least_budget(logits_fn: Any, *, norm: Norm = math.inf, width: int = 1, target: bool = False) -> int:
    """The smallest ``budget`` of `suite`, known before anything is trained.

    Args:
        logits_fn: What will be attacked; it is not asked.
        norm: 1, 2 or ``inf``.
        width: Draws in every answer: 1, or the members of an ensemble that answers with all of them.
        target: Whether classes are wanted.

    Returns:
        Forward evaluations per image.

    Raises:
        ValueError: bad settings.

    References:
        Croce and Hein, 2020, [Reliable evaluation of adversarial robustness with an ensemble of
        diverse parameter-free attacks](https://arxiv.org/abs/2003.01690)

    Examples:
        >>> import probdefense as pd
        >>> least_budget(pd.deterministic(torch.nn.Linear(4, 3)))
        167
    """
    function, width = as_logits_fn(logits_fn), check_count("width", width)
    stages = _stages(function, check_norm(norm), width, target)
    judging = HELD_OUT_DRAWS if function.stochastic else width
    return _needed(stages, judging * (len(stages) + 1) + width)


class Stage(NamedTuple):
    """One attack of the suite: its share of the budget, and what it costs.

    ``unit`` is the option that is counted, ``each`` what one of it costs and ``fixed`` what does not
    depend on it, in forward evaluations per image; ``again`` says that another start may find more.
    """

    name: str
    share: float
    draws: int
    attack: Attack
    each: int
    fixed: int = 0
    unit: str = "num_steps"
    again: bool = False


def _stages(logits_fn: LogitsFn, norm: Norm, width: int, targeted: bool) -> list[Stage]:
    """The attacks that suit the function and the norm; `width` is how many draws its answers have."""
    random = logits_fn.stochastic
    climb: Attack = partial(apgd, active_set=not random)
    source = logits_fn.mean() if random and hasattr(logits_fn, "mean") else logits_fn
    mean: Attack = transfer(partial(pgd, active_set=not random), source)
    few, many = (4, 8) if random else (width, width)
    surest: LossFn = probability_margin if random else predictive_margin
    aims, aimed = TARGETS, 2 * few + TARGETS * (SELECTION_DRAWS if random else width)
    toward: Attack = partial(climb, loss=dlr, num_targets=TARGETS)
    if targeted:  # the classes are given
        aims, aimed, toward = 1, 0, partial(climb, loss=dlr)
    stages = [
        Stage("mean", 0.1, width, mean, width),
        Stage("one draw", 0.25, width, _momentum if random else climb, width, again=True),
        Stage("margin", 0.3, many, partial(climb, loss=surest), many, again=True),
        Stage("targets", 0.15, few, toward, few * aims, aimed, again=True),
    ]
    if can_freeze(logits_fn) or not random:
        stages.append(Stage("nearest", 0.1, few, _nearest, few, few * (STRIDES + HALVINGS + 1)))
    if norm != 1:
        stages.append(Stage("square", 0.1, width, square, 1, unit="max_queries"))
    return stages


def _counts(stages: list[Stage], budget: int, overhead: int) -> list[int]:
    """How many steps or queries every stage gets; `overhead` is what comparing them costs.

    Raises:
        ValueError: the budget is too small.
    """
    needed, total = _needed(stages, overhead), sum(stage.share for stage in stages)
    if budget < needed:
        raise ValueError(
            f"expected more, got too little: budget={budget} does not pay for {LEAST} steps of every "
            f"attack; needed: {needed}"
        )
    fixed = overhead + sum(stage.fixed for stage in stages)
    return [int((budget - fixed) * stage.share / total / stage.each) for stage in stages]


def _needed(stages: list[Stage], overhead: int) -> int:
    """The smallest budget."""
    total = sum(stage.share for stage in stages)
    dearest = max(max(stage.each, stage.draws) / stage.share for stage in stages)
    return overhead + sum(stage.fixed for stage in stages) + math.ceil(LEAST * total * dearest)


def _momentum(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    eps: Any,
    norm: Norm,
    num_steps: int,
    target: Labels | None = None,
    seed: Seed = None,
) -> Inputs:
    """One draw a step, a linear loss, and momentum that averages the draws (Sitawarin et al., 2022)."""
    ball = Ball(x, eps, norm)
    return ascend(
        logits_fn,
        ball,
        ball.start(Stream.of(seed, x)),
        Goal(y, target, margin),
        step_size=2.5 * ball.radius / num_steps,
        num_steps=num_steps,
        momentum=0.9,
        name="suite, momentum",
    )


def _nearest(
    logits_fn: LogitsFn,
    x: Inputs,
    y: Labels,
    *,
    eps: Any,
    norm: Norm,
    num_steps: int,
    target: Labels | None = None,
    seed: Seed = None,
) -> Inputs:
    """FMN on frozen draws; its points go on along their rays to the sphere."""
    still = surrogate(logits_fn, "suite")
    points = fmn(still, x, y, norm=norm, num_steps=num_steps, target=target, seed=seed)
    ball, ray = Ball(x, eps, norm), points - x
    length = per_example(lp_norm(ray, norm), x).clamp_min(1e-12)
    return ball.project(x + ball.radius / length * ray)
