r"""Training on noisy copies of the inputs.

Zantedeschi et al., 2017, [Efficient Defenses Against Adversarial
Attacks](https://arxiv.org/abs/1707.06728): noise in training only, unlike Random Self-Ensemble.

$$ \min_\phi \mathbb{E}_{x, y}\, \mathbb{E}_{\Delta \sim N(0, \sigma^2 I)}\, \ell(\phi, x + \Delta, y) $$
"""

from typing import Any

import torch
from torch import Tensor

from probdefense.types import Inputs, Labels, Objective
from probdefense.validation import check_objective, check_positive


def gaussian_augmented(objective: Objective, sigma: float) -> Objective:
    r"""Adds Gaussian noise to the inputs of an objective, $\ell(\phi, x + \sigma \varepsilon, y)$.

    Noisy pixels are not clipped and leave [0, 1], so an objective with an attack goes outside:
    ``adversarial(gaussian_augmented(elbo, sigma), attack)``.

    Args:
        objective: What is minimized at the noisy point.
        sigma: Standard deviation in pixels, 0.05 for CIFAR-10 in the literature.

    Returns:
        ``objective(defense, x, y, **options)``.

    Raises:
        ValueError: `sigma` not positive.

    References:
        Zantedeschi et al., 2017, [Efficient Defenses Against Adversarial
        Attacks](https://arxiv.org/abs/1707.06728)

    Examples:
        >>> import probdefense as pd
        >>> defense, objective = pd.deterministic(torch.nn.Linear(4, 3)), pd.objectives.elbo
        >>> gaussian_augmented(objective, 0.1)(defense, torch.rand(8, 4), torch.zeros(8).long()).shape
        torch.Size([])
    """
    check_objective(objective)
    sigma = check_positive("sigma", sigma)

    def augmented_objective(defense: Any, x: Inputs, y: Labels, **options: Any) -> Tensor:
        return objective(defense, x + sigma * torch.randn_like(x), y, **options)

    return augmented_objective
