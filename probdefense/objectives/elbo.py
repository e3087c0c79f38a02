r"""Bounds on the evidence: the expected log-likelihood of one draw, or of the mean of several.

$$ \mathbb{E}_q \log p(y|x, \theta) \;\le\; \mathbb{E}_q \log \frac1K \sum_{k \le K} p(y|x, \theta_k)
   \;\le\; \log \mathbb{E}_q\, p(y|x, \theta) $$
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from probdefense.ops import log_mean_exp
from probdefense.types import Inputs, Labels, Objective
from probdefense.validation import check_count

Schedule = Callable[[float], float]
"""A multiplier as a function of training progress in [0, 1]."""


def elbo(
    defense: Any,
    x: Inputs,
    y: Labels,
    *,
    kl_weight: float | Mapping[str, float] = 1.0,
    num_particles: int = 1,
) -> Tensor:
    r"""The negative evidence lower bound, in nats per example.

    $$ -\frac1B \sum_i \log p(y_i|x_i) + \sum_f w_f \frac{\mathrm{KL}_f}{N} $$

    Times `num_data` it equals Pyro's ``TraceMeanField_ELBO``. The KL covers every element of every
    site, once per data set, so ordinary learning rates hold. With nothing random it is cross-entropy.

    Args:
        defense: A `Defense`.
        x: ``(batch, *event)``.
        y: ``(batch,)``.
        kl_weight: The temperature, one number or one per site; names may be patterns such as
            ``"*.noise"``, and sites that no pattern matches keep weight 1. Zero is allowed.
        num_particles: Draws to average over.

    Returns:
        A scalar in nats.

    Raises:
        ValueError: a KL term without a known `num_data`, or a negative weight.

    References:
        Blundell et al., 2015, [Weight Uncertainty in Neural Networks](https://arxiv.org/abs/1505.05424)

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.defenses.bayesian(torch.nn.Linear(4, 3), num_data=100)
        >>> elbo(defense, torch.rand(8, 4), torch.zeros(8).long()).shape
        torch.Size([])
    """
    check_count("num_particles", num_particles)
    losses = []
    for _ in range(num_particles):
        step = defense.step(x, y)
        losses.append(-step.log_lik.mean() + weighted_kl(defense, step.kl, kl_weight))
    return sum(losses[1:], losses[0]) / num_particles


def multi_sample(num_samples: int) -> Objective:
    r"""Trains the mean probability of several draws, as the prediction takes it.

    $$ -\frac1B \sum_i \log \frac1K \sum_k p(y_i|x_i, \theta_k) + \sum_f w_f \frac{\mathrm{KL}_f}{N} $$

    With one draw it is `elbo`; with many it tends to the loss of the ensemble that RSE predicts with.
    It lets draws specialize, where the expected loss asks each of them to be right alone.

    Args:
        num_samples: $K$, draws per step; each costs a forward and a backward pass.

    Returns:
        ``objective(defense, x, y, *, kl_weight=1.0)``.

    Raises:
        ValueError: `num_samples` below 1.

    References:
        Burda et al., 2016, [Importance Weighted Autoencoders](https://arxiv.org/abs/1509.00519), for the
        bound; Liu et al., 2018, [Towards Robust Neural Networks via Random
        Self-ensemble](https://arxiv.org/abs/1712.00673), for what it trains.

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.defenses.rse(pd.models.small_cnn())
        >>> multi_sample(3)(defense, torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([])
    """
    check_count("num_samples", num_samples)

    def multi_sample_objective(
        defense: Any, x: Inputs, y: Labels, *, kl_weight: float | Mapping[str, float] = 1.0
    ) -> Tensor:
        steps = [defense.step(x, y, defense.draw(x)) for _ in range(num_samples)]
        bound = log_mean_exp(torch.stack([step.log_lik for step in steps]))
        kl = sum(weighted_kl(defense, step.kl, kl_weight) for step in steps) / num_samples
        return kl - bound.mean()

    return multi_sample_objective


def weighted_kl(
    defense: Any, kl: Mapping[str, Tensor], weight: float | Mapping[str, float]
) -> Tensor | float:
    """KL terms times their weights, in nats per example.

    Raises:
        ValueError: a KL term without a known `num_data`, or a negative weight.
    """
    terms = [(weight_of(name, weight), value) for name, value in kl.items()]
    terms = [(w, value) for w, value in terms if w != 0]
    if not terms:
        return 0.0
    if defense.num_data is None:
        raise ValueError(
            f"the KL of {', '.join(kl)} counts once per data set, so its size is needed; "
            "build the defense with num_data=len(train_set)"
        )
    return sum(w * value for w, value in terms) / defense.num_data


def weight_of(site: str, weight: float | Mapping[str, float]) -> float:
    """The KL weight of a site: the number, or that of the first pattern that matches its name."""
    if isinstance(weight, Mapping):
        weight = next((w for pattern, w in weight.items() if fnmatchcase(site, pattern)), 1.0)
    if weight < 0:
        raise ValueError(f"expected kl_weight >= 0, got {weight} for site {site!r}")
    return weight
