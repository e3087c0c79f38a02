r"""Bounds on the evidence: the expected log-likelihood of one draw, or of the mean of several.

$$ \mathbb{E}_q \log p(y|x, \theta) \;\le\; \mathbb{E}_q \log \frac1K \sum_{k \le K} p(y|x, \theta_k)
   \;\le\; \log \mathbb{E}_q\, p(y|x, \theta) $$
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from probdefense.ops import log_mean_exp
from probdefense.types import JOINT, Inputs, Labels, Objective, Step
from probdefense.validation import check_count, check_positive

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
    Gradients reach discrete sites of your own guide by their score, as in Pyro's ``TraceGraph_ELBO``.

    Args:
        defense: A `Defense`.
        x: ``(batch, *event)``.
        y: ``(batch,)``.
        kl_weight: The temperature, one number or one per site; names may be patterns such as
            ``"*.noise"``, and sites that no pattern matches keep weight 1. Zero is allowed. Sites of a
            joint guide share one term, so they need one weight.
        num_particles: Draws to average over.

    Returns:
        A scalar in nats.

    Raises:
        ValueError: a KL term without a known `num_data`, a negative weight, one for an unknown site, or
            different weights for the sites of a joint guide.

    References:
        Blundell et al., 2015, [Weight Uncertainty in Neural Networks](https://arxiv.org/abs/1505.05424)

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.defenses.bayesian(torch.nn.Linear(4, 3), num_data=100)
        >>> elbo(defense, torch.rand(8, 4), torch.zeros(8).long()).shape
        torch.Size([])
    """
    check_count("num_particles", num_particles)
    for name, number in (kl_weight if isinstance(kl_weight, Mapping) else {"kl_weight": kl_weight}).items():
        check_positive(name if name == "kl_weight" else f"kl_weight of {name!r}", number, zero=True)
    losses = []
    for _ in range(num_particles):
        step = defense.step(x, y)
        log_lik = step.log_lik if step.score is None else step.log_lik + _of_a_guess(step)
        losses.append(weighted_kl(defense, step.kl, kl_weight) - log_lik.mean())
    return losses[0] if num_particles == 1 else sum(losses[1:], losses[0]) / num_particles


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
        bound = expected(log_mean_exp(torch.stack([log_lik_of_draw(step) for step in steps])), steps)
        kl = sum(weighted_kl(defense, step.kl, kl_weight) for step in steps) / num_samples
        return kl - (bound + sum(_of_a_guess(step) for step in steps)).mean()

    return multi_sample_objective


def expected(values: Tensor, steps: Sequence[Step]) -> Tensor:
    """Values per example of some draws, with the gradient of their expectation over discrete sites."""
    scores = [step.score for step in steps if step.score is not None]
    return values + values.detach() * sum(scores) if scores else values


def log_lik_of_draw(step: Step) -> Tensor:
    """The log-likelihood without its score term, for what is not linear in it; see `expected`."""
    return step.log_lik if step.score is None else step.log_lik - step.log_lik.detach() * step.score


def _of_a_guess(step: Step) -> Tensor | float:
    """A baseline: scores weigh what a draw gains on a blind guess, which has less variance, same mean."""
    return 0.0 if step.score is None else math.log(step.logits.shape[-1]) * step.score


def weighted_kl(
    defense: Any, kl: Mapping[str, Tensor], weight: float | Mapping[str, float]
) -> Tensor | float:
    """KL terms times their weights, in nats per example.

    Raises:
        ValueError: a KL term without a known `num_data`, a negative weight, one for an unknown site, or
            different weights for the sites of a joint guide.
    """
    if isinstance(weight, Mapping):
        _refuse_unknown(weight, {site for term in (*kl, *defense.sites) for site in term.split(JOINT)})
    terms = [(weight_of(name, weight), value) for name, value in kl.items()]
    terms = [(w, value) for w, value in terms if w != 0]
    if not terms:
        return 0.0
    if defense.num_data is None:
        raise ValueError(
            f"expected num_data, got none: the KL of {', '.join(kl)} counts once per data set; "
            "build the defense with num_data=len(train_set)"
        )
    first, *rest = (value if w == 1 else w * value for w, value in terms)
    return sum(rest, first) / defense.num_data


def weight_of(term: str, weight: float | Mapping[str, float]) -> float:
    """The KL weight of a term: the number, or that of the first pattern that matches its site's name."""
    sites = term.split(JOINT)
    weights = [_weight_of_site(site, weight) for site in sites]
    if len(set(weights)) > 1:
        raise ValueError(
            f"the guide draws {', '.join(map(repr, sites))} from one joint density, so they have one KL "
            f"term; got kl_weight {', '.join(map(str, weights))}: give them the same weight, or a guide "
            "with a density per site such as AutoNormal"
        )
    return weights[0]


def _weight_of_site(site: str, weight: float | Mapping[str, float]) -> float:
    if isinstance(weight, Mapping):
        weight = next((w for pattern, w in weight.items() if fnmatchcase(site, pattern)), 1.0)
    return weight


def _refuse_unknown(weight: Mapping[str, float], known: set[str]) -> None:
    for pattern in weight:
        if not any(fnmatchcase(site, pattern) for site in known):
            raise ValueError(
                f"unknown: kl_weight names {pattern!r}, which matches no random site; known: "
                f"{', '.join(sorted(known)) or '(none)'}"
            )
