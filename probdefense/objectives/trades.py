r"""TRADES: clean accuracy, and answers that do not change within the ball.

Zhang et al., 2019, [Theoretically Principled Trade-off between Robustness and
Accuracy](https://arxiv.org/abs/1901.08573).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from probdefense.objectives.elbo import expected, weighted_kl
from probdefense.types import Attack, Inputs, Labels, Logits, LossFn, Objective
from probdefense.validation import check_attack, check_positive


def trades(attack: Attack, beta: float) -> Objective:
    r"""Trades accuracy for robustness, one draw of the defense answering both points.

    $$ -\log p(y|x) + \beta \max_{x'} \mathrm{KL}\big(p(\cdot|x) \,\|\, p(\cdot|x')\big) + \sum_f w_f
       \frac{\mathrm{KL}_f}{N} $$

    The attack climbs that divergence and never sees the label. At $x$ its gradient is zero, so the
    attack must start at random.

    Args:
        attack: One that takes ``loss=``, such as ``partial(pgd, eps=0.2, num_steps=10)``; it has to
            climb the whole batch at once (no ``max_batch``).
        beta: $\beta$, 1 to 6 in the paper (its $1/\lambda$).

    Returns:
        ``objective(defense, x, y, *, kl_weight=1.0)``.

    Raises:
        ValueError: a negative `beta`, or an attack that splits the batch.

    References:
        Zhang et al., 2019, [Theoretically Principled Trade-off between Robustness and
        Accuracy](https://arxiv.org/abs/1901.08573)

    Examples:
        >>> import probdefense as pd
        >>> objective = trades(partial(pd.attacks.pgd, eps=0.1, num_steps=2), beta=6.0)
        >>> objective(pd.deterministic(torch.nn.Linear(4, 3)), torch.rand(8, 4), torch.zeros(8).long()).shape
        torch.Size([])
    """
    check_attack(attack)
    beta = check_positive("beta", beta, zero=True)

    def trades_objective(
        defense: Any, x: Inputs, y: Labels, *, kl_weight: float | Mapping[str, float] = 1.0
    ) -> Tensor:
        draws = defense.draw(x)
        function = defense.at({name: value.detach() for name, value in draws.items()})
        with torch.no_grad():
            still = function(x)
        x_adv = attack(function, x, y, loss=divergence_from(still))
        clean, moved = defense.step(x, y, draws), defense.step(x_adv, y, draws)
        change = expected(divergence_from(clean.logits.unsqueeze(0))(moved.logits.unsqueeze(0), y), [clean])
        kl = weighted_kl(defense, clean.kl, kl_weight)
        return beta * change.mean() - clean.log_lik.mean() + kl

    return trades_objective


def divergence_from(reference: Logits) -> LossFn:
    r"""The loss $\mathrm{KL}(p_{\text{reference}} \| p)$, mean over draws; labels do not matter."""
    target = reference.log_softmax(-1)

    def divergence(logits: Logits, y: Labels) -> Tensor:
        if logits.shape != target.shape:
            raise ValueError(
                f"expected the whole batch at once, logits {tuple(target.shape)}, got {tuple(logits.shape)}; "
                "leave max_batch and active_set out of the attack"
            )
        return kl_div(logits.log_softmax(-1), target, reduction="none", log_target=True).sum(-1).mean(0)

    return divergence
