r"""Training for certificates: attacks on the mean probability of noisy copies, answers that agree.

A certificate grows with the share of noisy copies that agree. `smooth_adversarial` trains on points where
their mean probability is worst, `consistency` pulls the copies together, `stability` the clean answer and a
noisy one. The noise is the defense's own (``rse(net, sigma_init=0.25, sigma_inner=0.0)``); only `stability`
adds some.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from probdefense.logits.adapters import Static
from probdefense.logits.losses import predictive_cross_entropy
from probdefense.objectives.draws import InTurn, detached, logits_at, over_draws
from probdefense.objectives.elbo import expected
from probdefense.ops import entropy, log_mean_exp
from probdefense.types import Attack, Inputs, Labels, Objective
from probdefense.validation import check_attack, check_count, check_objective, check_positive

ENTROPY_WEIGHT = 0.5
"""Of the entropy of the mean answer in `consistency`, as in the paper."""


def smooth_adversarial(objective: Objective, attack: Attack, *, num_samples: int = 2) -> Objective:
    r"""Trains on points that are adversarial to the mean probability of noisy copies (SmoothAdv).

    $$ \delta^* = \arg\max_{\|\delta\| \le \epsilon} -\log \frac1K \sum_{k \le K} p(y | x + \delta, \xi_k),
       \qquad \min_\phi \frac1K \sum_k \ell(\phi, x + \delta^*, y, \xi_k) $$

    The draws $\xi_k$ (input noise and whatever else is random) are the same in every step of the attack and
    in the training forwards after it. An attack on the mean cross-entropy of the draws would fool single
    draws; this one fools the smoothed classifier, whose mean is certified.

    Args:
        objective: What is minimized, once for every draw: `elbo`, or ``consistency(elbo, K, weight)``,
            which takes all draws at once.
        attack: One that takes ``loss=``, such as ``partial(pgd, norm=2, eps=0.5, num_steps=4)``.
        num_samples: $K$, 1 to 8 in the paper.

    Returns:
        ``objective(defense, x, y, **options)``.

    Raises:
        TypeError: an attack or objective that is none.
        ValueError: `num_samples` below 1.

    References:
        Salman et al., 2019, [Provably Robust Deep Learning via Adversarially Trained Smoothed
        Classifiers](https://arxiv.org/abs/1906.04584)

    Examples:
        >>> import probdefense as pd
        >>> attack = partial(pd.attacks.pgd, norm=2, eps=0.5, num_steps=2)
        >>> defense = pd.defenses.rse(pd.models.small_cnn(), sigma_init=0.25, sigma_inner=0.0)
        >>> objective = smooth_adversarial(pd.objectives.elbo, attack, num_samples=2)
        >>> objective(defense, torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([])
    """
    check_objective(objective)
    check_attack(attack)
    num_samples = check_count("num_samples", num_samples)

    def smooth_adversarial_objective(defense: Any, x: Inputs, y: Labels, **options: Any) -> Tensor:
        draws = [defense.draw(x) for _ in range(num_samples)]
        seen = [detached(draw) for draw in draws]
        attacked = Static(partial(logits_at, defense, seen))
        x_adv = attack(attacked, x, y, loss=predictive_cross_entropy)
        return over_draws(objective, InTurn(defense, draws), num_samples, x_adv, y, **options)

    return smooth_adversarial_objective


def consistency(objective: Objective, num_samples: int, weight: float) -> Objective:
    r"""Pulls the answers of several draws toward their mean, and the mean away from indecision.

    $$ \frac1K \sum_k \ell(\phi, x, y, \xi_k) + \frac1B \sum_i \Big[ \frac{\lambda}{K} \sum_k
       \mathrm{KL}(\bar p \,\|\, p_k) + \frac12 H(\bar p) \Big], \qquad \bar p = \frac1K \sum_k p_k $$

    Args:
        objective: $\ell$, evaluated at every draw; its forward passes give the $p_k$.
        num_samples: $K$, 2 in the paper.
        weight: $\lambda$, 5 to 20 in the paper.

    Returns:
        ``objective(defense, x, y, **options)``.

    Raises:
        TypeError: an objective that is none.
        ValueError: fewer than two draws, or a negative weight.

    References:
        Jeong and Shin, 2020, [Consistency Regularization for Certified Robustness of Smoothed
        Classifiers](https://arxiv.org/abs/2006.04062)

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.defenses.rse(pd.models.small_cnn(), sigma_init=0.25, sigma_inner=0.0)
        >>> objective = consistency(pd.objectives.elbo, num_samples=2, weight=10.0)
        >>> objective(defense, torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([])
    """
    check_objective(objective)
    num_samples = check_count("num_samples", num_samples, least=2)
    weight = check_positive("weight", weight, zero=True)

    def consistent_objective(defense: Any, x: Inputs, y: Labels, **options: Any) -> Tensor:
        view = InTurn(defense, [defense.draw(x) for _ in range(num_samples)])
        loss = over_draws(objective, view, num_samples, x, y, **options)
        log_probs = torch.stack([step.logits for step in view.steps]).log_softmax(-1)
        mean = log_mean_exp(log_probs)
        apart = (
            kl_div(log_probs, mean.expand_as(log_probs), reduction="none", log_target=True).sum(-1).mean(0)
        )
        spread = weight * apart + ENTROPY_WEIGHT * entropy(mean)
        return loss + expected(spread, view.steps).mean()

    return consistent_objective


def stability(objective: Objective, sigma: float, weight: float) -> Objective:
    r"""Asks a noisy copy for the answer of the clean image, both at one draw of the defense.

    $$ \ell(\phi, x, y) + \frac{\lambda}{B} \sum_i \mathrm{KL}\big(p(\cdot | x_i) \,\|\,
       p(\cdot | x_i + \sigma \varepsilon_i)\big) $$

    It trains a network for noise that it gets later, as in ``rse(net, sigma_init=sigma)``.

    Args:
        objective: $\ell$, at the clean image.
        sigma: $\sigma$, in pixels.
        weight: $\lambda$, 1 or 2 in the literature.

    Returns:
        ``objective(defense, x, y, **options)``.

    Raises:
        TypeError: an objective that is none.
        ValueError: `sigma` not positive, or a negative weight.

    References:
        Zheng et al., 2016, [Improving the Robustness of Deep Neural Networks via Stability
        Training](https://arxiv.org/abs/1604.04326); Li et al., 2019, [Certified Adversarial Robustness with
        Additive Noise](https://arxiv.org/abs/1809.03113), for certificates

    Examples:
        >>> import probdefense as pd
        >>> objective = stability(pd.objectives.elbo, sigma=0.25, weight=2.0)
        >>> objective(pd.deterministic(torch.nn.Linear(4, 3)), torch.rand(8, 4), torch.zeros(8).long()).shape
        torch.Size([])
    """
    check_objective(objective)
    sigma, weight = check_positive("sigma", sigma), check_positive("weight", weight, zero=True)

    def stable_objective(defense: Any, x: Inputs, y: Labels, **options: Any) -> Tensor:
        view = InTurn(defense, [defense.draw(x)])
        loss = over_draws(objective, view, 1, x, y, **options)
        still = view.steps[-1]
        moved = view.step(x + sigma * torch.randn_like(x), y)
        target, found = still.logits.log_softmax(-1), moved.logits.log_softmax(-1)
        apart = kl_div(found, target, reduction="none", log_target=True).sum(-1)
        return loss + weight * expected(apart, [still]).mean()

    return stable_objective
