r"""Training on attacked inputs: Madry's minimax, its mixtures with clean inputs, and the way there.

$$ \min_\phi \mathbb{E}\, \ell(\phi, x + \delta^*(x), y), \qquad
   \delta^*(x) = \arg\max_{\|\delta\|_p \le \epsilon} \ell(\phi, x + \delta, y) $$
"""

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from probdefense.nn.passes import statistics_kept
from probdefense.objectives.draws import InTurn, detached
from probdefense.types import Attack, Inputs, Labels, LogitsFn, Objective
from probdefense.validation import (
    check_attack,
    check_count,
    check_eps,
    check_member,
    check_objective,
    check_share,
)


def adversarial(
    objective: Objective,
    attack: Attack,
    *,
    num_samples: int = 1,
    same_draw: bool = False,
    bn_stats: Literal["clean", "adversarial", "both"] = "adversarial",
) -> Objective:
    r"""Trains on attacked inputs, $\min_\phi \mathbb{E}\, \ell(\phi, x + \delta^*(x), y)$.

    With `elbo` this is adversarial SVI (Adv-BNN); with nothing random it is PGD training, and with
    ``partial(fgsm, random_start=True, eps=...)`` fast adversarial training. The inner attack never
    moves running statistics, and its result counts as a constant (Danskin).

    Args:
        objective: What is minimized at the attacked point, `elbo` for example.
        attack: ``attack(logits_fn, x, y) -> x_adv``, such as ``partial(pgd, eps=0.2, num_steps=7)``.
        num_samples: Draws per step that the attack averages its loss over, independent of the draw
            that is then trained.
        same_draw: Whether the attack sees the very draw that is then trained.
        bn_stats: Which inputs move the running statistics of BatchNorm: the attacked ones that are
            trained (as Madry et al. do), clean ones in an extra pass, or both. The pass that is
            trained normalizes by its own batch in any case.

    Returns:
        ``objective(defense, x, y, **options)``.

    Raises:
        ValueError: `num_samples` above 1 together with `same_draw`, or an unknown `bn_stats`.

    References:
        Madry et al., 2018, [Towards Deep Learning Models Resistant to Adversarial
        Attacks](https://arxiv.org/abs/1706.06083); Liu et al., 2019,
        [Adv-BNN](https://arxiv.org/abs/1810.01279); Wong et al., 2020, [Fast is better than
        free](https://arxiv.org/abs/2001.03994)

    Examples:
        >>> import probdefense as pd
        >>> from functools import partial
        >>> madry = adversarial(pd.objectives.elbo, partial(pd.attacks.pgd, eps=0.1, num_steps=2))
        >>> defense = pd.deterministic(torch.nn.Linear(4, 3))
        >>> madry(defense, torch.rand(8, 4), torch.zeros(8).long()).shape
        torch.Size([])
    """
    check_objective(objective)
    check_attack(attack)
    num_samples = check_count("num_samples", num_samples)
    if same_draw and num_samples > 1:
        raise ValueError(
            f"expected num_samples=1 with same_draw=True, got {num_samples}; one draw is attacked and trained"
        )
    check_member("bn_stats", bn_stats, ("clean", "adversarial", "both"))

    def adversarial_objective(defense: Any, x: Inputs, y: Labels, **options: Any) -> Tensor:
        trained: Any = defense
        if same_draw:
            draws = defense.draw(x)
            attacked, trained = defense.at(detached(draws)), InTurn(defense, [draws])
        else:
            attacked = defense.samples(num_samples)
        x_adv = attack(attacked, x, y)
        if bn_stats == "adversarial":
            return objective(trained, x_adv, y, **options)
        with statistics_kept(defense) if bn_stats == "clean" else nullcontext():
            loss = objective(trained, x_adv, y, **options)
        defense.move_statistics(x)
        return loss

    return adversarial_objective


def mixed(
    objective: Objective,
    attack: Attack,
    *,
    probability: float | None = None,
    weight: float | None = None,
) -> Objective:
    r"""Trains on clean and attacked inputs, by chance or by weight.

    With a `probability` $p$ each batch is attacked as a whole with chance $p$: FGSM adversarial
    retraining is ``mixed(elbo, fgsm, probability=0.5)`` from a trained network. With a `weight` $w$
    every batch counts both ways, $(1 - w)\, \ell(x) + w\, \ell(x + \delta^*)$: 0.5 for PNI.

    Args:
        objective: What is minimized at either point.
        attack: ``attack(logits_fn, x, y) -> x_adv``; it sees one draw per step.
        probability: Chance of an attacked batch.
        weight: Share of the attacked loss.

    Returns:
        ``objective(defense, x, y, **options)``.

    Raises:
        ValueError: not exactly one of the two, or one outside [0, 1].

    References:
        Goodfellow et al., 2015, [Explaining and Harnessing Adversarial
        Examples](https://arxiv.org/abs/1412.6572); He et al., 2019, [Parametric Noise
        Injection](https://arxiv.org/abs/1811.09310)

    Examples:
        >>> import probdefense as pd
        >>> half = mixed(pd.objectives.elbo, partial(pd.attacks.fgsm, eps=0.1), weight=0.5)
        >>> half(pd.deterministic(torch.nn.Linear(4, 3)), torch.rand(8, 4), torch.zeros(8).long()).shape
        torch.Size([])
    """
    share = probability if weight is None else weight
    if share is None or (probability is not None and weight is not None):
        raise ValueError(
            f"expected probability or weight, one of them, got {probability} and {weight}; by chance or by "
            "weight"
        )
    share = check_share("probability" if weight is None else "weight", share, ends="[]")
    attacked = adversarial(objective, attack)

    def mixed_objective(defense: Any, x: Inputs, y: Labels, **options: Any) -> Tensor:
        if weight is None:
            chosen = attacked if bool(torch.rand(()) < share) else objective
            return chosen(defense, x, y, **options)
        clean = objective(defense, x, y, **options)
        return (1 - share) * clean + share * attacked(defense, x, y, **options)

    return mixed_objective


def warm_up(attack: Attack, *, eps: float, num_steps: int) -> Attack:
    r"""Lets the radius of an attack grow over its first calls, $\epsilon_t = \epsilon \min(1, t / T)$.

    Small networks collapse to a constant answer when they meet the full radius untrained.

    Args:
        attack: One that takes ``eps=``.
        eps: The final radius in pixels.
        num_steps: $T$, calls until it is reached: training steps, inside an objective.

    Returns:
        ``attack(logits_fn, x, y)``. It counts its calls, which checkpoints of `fit` hold: make a new one for
        every training.

    Raises:
        ValueError: a negative radius or `num_steps` below 1.

    Examples:
        >>> import probdefense as pd
        >>> net, x, y = pd.deterministic(torch.nn.Linear(4, 3)), torch.full((1, 4), 0.5), torch.tensor([0])
        >>> warming = warm_up(pd.attacks.fgsm, eps=0.2, num_steps=2)
        >>> [round(float((warming(net, x, y) - x).abs().max()), 3) for _ in range(3)]
        [0.1, 0.2, 0.2]
    """
    check_attack(attack)
    eps, num_steps = check_eps(eps), check_count("num_steps", num_steps)
    return _WarmingUp(attack, eps, num_steps)


class _WarmingUp:
    """An attack that counts its calls."""

    def __init__(self, attack: Attack, eps: float, num_steps: int):
        self.attack, self.eps, self.num_steps, self.calls = attack, eps, num_steps, 0

    def __call__(self, logits_fn: LogitsFn, x: Inputs, y: Labels, **options: Any) -> Inputs:
        self.calls += 1
        eps = self.eps * min(1.0, self.calls / self.num_steps)
        return self.attack(logits_fn, x, y, eps=eps, **options)

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]
