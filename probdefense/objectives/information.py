r"""Information gain: attacked inputs shall tell the posterior as much, or as little, as clean ones.

Doan et al., 2022, [Bayesian Learning with Information
Gain](https://arxiv.org/abs/2212.02003). The information gain of an answer is the mutual
information of label and weights, what the draws disagree about:

$$ I(x) = H\big[\mathbb{E}_\theta\, p_\theta(x)\big] - \mathbb{E}_\theta\, H\big[p_\theta(x)\big] $$
"""

from typing import Any

from torch import Tensor

from probdefense.objectives.svgd import draws_of
from probdefense.ops import log_mean_exp
from probdefense.types import Attack, Inputs, Labels, Objective
from probdefense.validation import check_attack, check_count, check_objective, check_positive


def information_gain(
    objective: Objective, attack: Attack, *, weight: float = 1.0, num_samples: int = 4
) -> Objective:
    r"""Trains at attacked inputs, and for as much information in them, $\ell(x^*) + w\, |I(x^*) - I(x)|$.

    The second term is zero, and has no gradient, where nothing is random.

    Args:
        objective: What is minimized at the attacked inputs.
        attack: ``attack(logits_fn, x, y) -> x_adv``; it sees as many draws as the information is taken from.
        weight: $w$, per nat of information.
        num_samples: Draws that the information is taken from; all members, of an ensemble.

    Returns:
        ``objective(defense, x, y, **options)``.

    Raises:
        TypeError: something else than functions.
        ValueError: a negative weight, or fewer than two draws.

    References:
        Doan et al., 2022, [Bayesian Learning with Information Gain Provably Bounds Risk for a Robust
        Adversarial Defense](https://arxiv.org/abs/2212.02003)

    Examples:
        >>> import probdefense as pd
        >>> gain = information_gain(pd.objectives.elbo, partial(pd.attacks.fgsm, eps=0.1), weight=0.5)
        >>> pair = pd.defenses.particles([torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)], num_data=8)
        >>> gain(pair, torch.rand(8, 4), torch.zeros(8).long()).shape
        torch.Size([])
    """
    check_objective(objective)
    check_attack(attack)
    check_positive("weight", weight, zero=True)
    check_count("num_samples", num_samples, 2)

    def information_objective(defense: Any, x: Inputs, y: Labels, **options: Any) -> Tensor:
        count = draws_of(defense, num_samples)
        x_adv = attack(defense.samples(count), x, y)
        gap = mutual_information(defense(x_adv, count)) - mutual_information(defense(x, count))
        return objective(defense, x_adv, y, **options) + weight * gap.abs().mean()

    return information_objective


def mutual_information(logits: Tensor) -> Tensor:
    r"""$I = H[\mathbb{E}\,p] - \mathbb{E}\,H[p]$ in nats, ``(samples, batch, classes) -> (batch,)``."""
    log_probs = logits.log_softmax(-1)
    return _entropy(log_mean_exp(log_probs)) - _entropy(log_probs).mean(0)


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs.clamp_min(-1e4)).sum(-1)
