"""Several attacks as one: every example gets the worst of their points.

The worst point is the one with the smallest margin of the decision rule on draws that no attack has
climbed, the same draws for all. Choosing by the loss, or on the draws of a verdict, would favor luck.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from probdefense.attacks.tools.border import attack
from probdefense.attacks.tools.gradient import ask
from probdefense.attacks.tools.selection import Best, Goal
from probdefense.attacks.tools.settle import held_out
from probdefense.logits.rules import mean_prob
from probdefense.ops import Ball
from probdefense.rng import Stream
from probdefense.types import Attack, Inputs, Labels, LogitsFn, Rule, Seed
from probdefense.validation import check_attack, check_function, check_kind


def worst_of(attacks: Sequence[Attack], *, rule: Rule = mean_prob) -> Attack:
    r"""An attack that runs several and keeps, per example, the point with the smallest margin.

    $$ x_{adv} = \arg\min_{x' \in \{x, A_1(x), \dots, A_k(x)\}} m(x'), \qquad
       m = \text{the margin of the rule on held-out draws} $$

    Options such as ``eps``, ``norm`` and ``seed`` go to the attacks that take them. The point of one
    without a radius is projected to the ball if there is one. With a ``target`` the margin is that of the
    class wanted: a point of any other class counts for nothing.

    Args:
        attacks: Attacks, configured with ``functools.partial``.
        rule: By which points are compared.

    Returns:
        An attack with the options of all of them, ``(logits_fn, x, y, *, ...) -> x_adv``.

    Raises:
        ValueError: no attacks.

    References:
        Croce and Hein, 2020, [Reliable evaluation of adversarial robustness with an ensemble of
        diverse parameter-free attacks](https://arxiv.org/abs/2003.01690)

    Examples:
        >>> import probdefense as pd
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> both = worst_of([pd.attacks.fgsm, partial(pd.attacks.pgd, num_steps=3)])
        >>> x_adv = both(net, torch.rand(2, 4), torch.tensor([0, 1]), eps=0.1)
    """
    check_kind("attacks", attacks, (list, tuple), "give a list of attacks")
    if not attacks:
        raise ValueError("expected at least one attack, got none; give a list of attacks")
    for one in attacks:
        check_attack(one)
    check_function("rule", rule, "logits")

    def worst(
        logits_fn: LogitsFn,
        x: Inputs,
        y: Labels,
        *,
        seed: Seed = None,
        max_batch: int | None = None,
        **options: Any,
    ) -> Inputs:
        rng, judge, best = Stream.of(seed, x), held_out(logits_fn), Best(x)
        goal = Goal(y, options.get("target"), rule=rule)
        found = (run(one, logits_fn, x, y, rng.split(str(n)), options) for n, one in enumerate(attacks))
        for points in itertools.chain([x], found):
            best.offer(points, goal.remaining(ask(judge, points)))
        return best.x

    return made_of(worst, attacks)


def run(
    one: Attack, logits_fn: LogitsFn, x: Inputs, y: Labels, rng: Stream, options: Mapping[str, Any]
) -> Inputs:
    """The points of one of several attacks, by the options that it takes, put in the ball if there is one."""
    free = free_options(one)
    given = {name: value for name, value in {**options, "seed": rng}.items() if name in free}
    points = one(logits_fn, x, y, **given)
    if "eps" in options and "eps" not in given:
        return Ball(x, options["eps"], options.get("norm", math.inf)).project(points)
    return points


def made_of(body: Callable[..., Inputs], attacks: Sequence[Attack]) -> Attack:
    """The public attack of a body that hands options on; the options of `attacks` become its own."""
    own = [p for p in inspect.signature(body).parameters.values() if p.kind is not p.VAR_KEYWORD]
    taken = {name: p for one in attacks for name, p in free_options(one).items()}
    public: Any = attack(body)
    public.parts = tuple(attacks)  # so that a radius or a norm that one of them fixes can be known
    public.__signature__ = inspect.Signature(
        [*own, *(p for name, p in taken.items() if name not in ("seed", "max_batch"))]
    )
    return public


def free_options(one: Attack) -> dict[str, inspect.Parameter]:
    """The options that an attack takes and that its user has not fixed with ``partial``."""
    if hasattr(one, "attack"):  # with_draws
        return free_options(one.attack)
    fixed = one.keywords if isinstance(one, functools.partial) else {}
    parameters = inspect.signature(one).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY and name not in fixed}
