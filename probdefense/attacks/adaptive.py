r"""Attacks on defenses that adapt at test time: they simulate the defense and attack what it becomes.

Chen, Wu, Guo, Liang and Jha, 2022, [Towards Evaluating the Robustness of Neural Networks Learned by
Transduction](https://arxiv.org/abs/2110.14735). The attacker knows the data, the code and the state of
the defense before the input arrives, but not its seed. A point changes the model that judges it, so the
attack alternates: attack the models so far, simulate the defense on the result, and again.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from probdefense.attacks.tools.border import attack as public_attack
from probdefense.attacks.tools.selection import Best, remaining_margin
from probdefense.logits.losses import expected_cross_entropy
from probdefense.logits.rules import mean_prob
from probdefense.progress import track
from probdefense.rng import Stream, derive
from probdefense.types import AdaptiveLogitsFn, Attack, Inputs, Labels, Logits, LogitsFn, Rule, Seed
from probdefense.validation import check_member

JUDGES = 2
"""Simulated defenders that choose among the candidates; their seeds serve no other purpose."""


@public_attack
def fpa(
    adaptive: Any,
    x: Inputs,
    y: Labels,
    *,
    attack: Attack,
    num_rounds: int = 4,
    rule: Rule = mean_prob,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""Fixed point attack: attacks the model that the last point made.

    $$ x_{i+1} = A(F_i), \qquad F_{i+1} = \Gamma(F, x_{i+1}) $$

    Among all points found, the static base's included, it keeps the one that simulated defenders with
    other seeds handle worst. Inputs are taken in stream order, and the stream moves on with each.

    Args:
        adaptive: An adaptive defense, as `rmc` makes it; found again as it was.
        x: ``(batch, *event)`` in [0, 1], in stream order.
        y: True classes, ``(batch,)``.
        attack: The inner attack with its budget, such as ``partial(pgd, eps=0.1)``.
        num_rounds: Simulations of the defense per input.
        rule: By which candidates are judged.
        seed: An int, one per example, or a generator.
        max_batch: Examples at once.

    Returns:
        Points of the inner attack's ball, ``(batch, *event)``.

    Raises:
        TypeError: the defense does not adapt.

    References:
        Chen et al., 2022, [Towards Evaluating the Robustness of Neural Networks Learned by
        Transduction](https://arxiv.org/abs/2110.14735)

    Examples:
        >>> import probdefense as pd
        >>> base = pd.deterministic(torch.nn.Linear(4, 3))
        >>> inner = partial(pd.attacks.fgsm, eps=0.1)
        >>> data = torch.rand(40, 4), torch.randint(3, (40,))
        >>> adaptive = pd.rmc(base, data, attack=inner, num_neighbors=16, max_epochs=1)
        >>> fpa(adaptive, torch.rand(2, 4), torch.tensor([0, 1]), attack=inner, num_rounds=1).shape
        torch.Size([2, 4])
    """

    def newest(models: list[LogitsFn], x: Inputs, y: Labels) -> Inputs:
        return attack(models[-1], x, y)

    return _alternate(adaptive, x, y, attack, newest, num_rounds, rule, Stream.of(seed, x).seed())


@public_attack
def gmsa(
    adaptive: Any,
    x: Inputs,
    y: Labels,
    *,
    attack: Attack,
    num_rounds: int = 4,
    combine: Literal["avg", "min"] = "avg",
    rule: Rule = mean_prob,
    seed: Seed = None,
    max_batch: int | None = None,
) -> Inputs:
    r"""Greedy model space attack: attacks all models that the defense became so far.

    $$ x_{i+1} = \arg\max_{x'} \frac{1}{i+1} \sum_{j \le i} \ell(F_j(x'), y) \quad \text{(avg)}, \qquad
       \arg\max_{x'} \min_{j \le i} \ell(F_j(x'), y) \quad \text{(min)} $$

    Args:
        adaptive: An adaptive defense, as `rmc` makes it; found again as it was.
        x: ``(batch, *event)`` in [0, 1], in stream order.
        y: True classes, ``(batch,)``.
        attack: The inner attack with its budget; for ``combine="min"`` it must take ``loss=``.
        num_rounds: Simulations of the defense per input.
        combine: ``"avg"`` (GMSA-AVG) or ``"min"`` (GMSA-MIN).
        rule: By which candidates are judged.
        seed: An int, one per example, or a generator.
        max_batch: Examples at once.

    Returns:
        Points of the inner attack's ball, ``(batch, *event)``.

    Raises:
        TypeError: the defense does not adapt.
        ValueError: another `combine`.

    References:
        Chen et al., 2022, [Towards Evaluating the Robustness of Neural Networks Learned by
        Transduction](https://arxiv.org/abs/2110.14735)

    Examples:
        >>> import probdefense as pd
        >>> base = pd.deterministic(torch.nn.Linear(4, 3))
        >>> inner = partial(pd.attacks.fgsm, eps=0.1)
        >>> data = torch.rand(40, 4), torch.randint(3, (40,))
        >>> adaptive = pd.rmc(base, data, attack=inner, num_neighbors=16, max_epochs=1)
        >>> gmsa(adaptive, torch.rand(2, 4), torch.tensor([0, 1]), attack=inner, num_rounds=1).shape
        torch.Size([2, 4])
    """
    check_member("combine", combine, ("avg", "min"))

    def all_so_far(models: list[LogitsFn], x: Inputs, y: Labels) -> Inputs:
        if combine == "avg":
            return attack(Members(models), x, y)
        return attack(Members(models), x, y, loss=least_over(len(models)))

    return _alternate(adaptive, x, y, attack, all_so_far, num_rounds, rule, Stream.of(seed, x).seed())


class Members:
    """Several functions as one: their draws one after another on the sample axis."""

    def __init__(self, models: list[LogitsFn]):
        self.models = list(models)

    @property
    def stochastic(self) -> bool:
        """Whether one of them is."""
        return any(model.stochastic for model in self.models)

    def __call__(self, x: Inputs, num_samples: int | None = None) -> Logits:
        """``(members x samples, batch, classes)``."""
        return torch.cat([model(x, num_samples) for model in self.models])

    def freeze(self, num_samples: int = 1) -> "Members":
        """Every member frozen."""
        return Members([model.freeze(num_samples) for model in self.models])


def least_over(num_models: int) -> Callable[[Logits, Labels], Tensor]:
    """The smallest expected cross-entropy over models that share the sample axis evenly."""

    def least(logits: Logits, y: Labels) -> Tensor:
        return torch.stack([expected_cross_entropy(part, y) for part in logits.chunk(num_models)]).amin(0)

    return least


def _alternate(
    adaptive: AdaptiveLogitsFn,
    x: Inputs,
    y: Labels,
    attack: Attack,
    find: Callable[[list[LogitsFn], Inputs, Labels], Inputs],
    num_rounds: int,
    rule: Rule,
    seed: int,
) -> Inputs:
    """Attacks the stream group by group, moving a simulated defender along; restores the state found."""
    if not hasattr(adaptive, "simulate"):
        raise TypeError(
            f"expected an adaptive defense, got {type(adaptive).__name__}, which never adapts; make one with "
            "probdefense.rmc, or use another attack"
        )
    found, points = adaptive.state(), []
    try:
        for number, start in enumerate(track(range(0, len(x), adaptive.group), "adaptive attack")):
            rows, key = slice(start, start + adaptive.group), derive(seed, number)
            best = Best(x[rows])
            models: list[LogitsFn] = [adaptive]
            candidates = [attack(adaptive.static, x[rows], y[rows])]
            for round_ in range(num_rounds):
                candidates.append(find(models, x[rows], y[rows]))
                models.append(adaptive.simulate(candidates[-1], seed=derive(key, "model", round_)))
            for candidate in candidates:
                best.offer(candidate, _judged(adaptive, candidate, y[rows], rule, key))
            points.append(best.x)
            adaptive.respond(best.x, seed=derive(key, "stream"))
    finally:
        adaptive.restore(found)
    return torch.cat(points)


def _judged(adaptive: AdaptiveLogitsFn, x: Inputs, y: Labels, rule: Rule, key: int) -> Tensor:
    """The margin that defenders with seeds of their own keep after adapting to a point, ``(batch,)``."""
    defenders = [adaptive.simulate(x, seed=derive(key, "judge", number)) for number in range(JUDGES)]
    return torch.stack([remaining_margin(defender, x, y, rule) for defender in defenders]).mean(0)
