"""Random weights: posteriors, noise, masks and members."""

from functools import partial
from typing import Any

import pyro.distributions as dist

from probdefense import defenses
from probdefense.core.defense import Defense
from probdefense.objectives import adversarial, elbo, mixed
from probdefense.study import opponents
from probdefense.study.workshop import Workshop, recipe
from probdefense.types import LogitsFn


def _prior(prior_scale: float = 1.0, kl_weight: float = 1.0) -> dict[str, Any]:
    """What a Bayesian row says of itself."""
    return {"prior": f"Normal(0, {prior_scale:g})", "kl_weight": kl_weight}


def _mean_field(shop: Workshop, prior_scale: float) -> Defense:
    return defenses.bayesian(shop.net(), prior=dist.Normal(0.0, prior_scale), num_data=shop.num_data)


@recipe(
    "khan",
    about="every weight a learned distribution, no prior (Khan et al., 2019)",
    opponent=opponents.matched_loss,
    notes=lambda: {"prior": "none", "kl_weight": 0.0},
    learning_rate=16e-3,
)
def khan(shop: Workshop) -> LogitsFn:
    """Nothing but the likelihood is trained."""
    defense = defenses.bayesian(shop.net(), prior=None, num_data=shop.num_data)
    return shop.fit(defense, partial(elbo, kl_weight=0.0))


@recipe(
    "bayesian",
    about="Bayes by backprop: mean-field weights (Blundell et al., 2015)",
    opponent=opponents.matched_loss,
    notes=_prior,
    learning_rate=8e-3,
)
def bayesian(shop: Workshop, prior_scale: float = 1.0, kl_weight: float = 1.0) -> LogitsFn:
    """The ELBO of a mean-field posterior."""
    return shop.fit(_mean_field(shop, prior_scale), partial(elbo, kl_weight=kl_weight))


@recipe(
    "adv_bnn",
    about="mean-field weights, adversarial ELBO (Liu et al., 2019)",
    opponent=opponents.matched_loss,
    cost=5,
    notes=_prior,
    learning_rate=4e-3,
    attacked=True,
)
def adv_bnn(shop: Workshop, prior_scale: float = 1.0, kl_weight: float = 1.0) -> LogitsFn:
    """The ELBO of attacked images."""
    objective = adversarial(partial(elbo, kl_weight=kl_weight), shop.inner_attack())
    return shop.fit(_mean_field(shop, prior_scale), objective)


@recipe(
    "pni",
    about="trained weight noise, half adversarial (He et al., 2019)",
    opponent=opponents.matched_loss,
    cost=6,
    learning_rate=8e-3,
    attacked=True,
)
def pni(shop: Workshop, alpha_init: float = 0.25, weight: float = 0.5) -> LogitsFn:
    """Noise in proportion to the deviation of each tensor, half of the loss under attack."""
    defense = defenses.pni(shop.net(), alpha_init=alpha_init)
    return shop.fit(defense, mixed(elbo, shop.inner_attack(), weight=weight))


@recipe(
    "mc_dropout",
    about="dropout masks at test time (Gal and Ghahramani, 2016)",
    opponent=opponents.matched_loss,
    learning_rate=8e-3,
)
def mc_dropout(shop: Workshop, rate: float = 0.2) -> LogitsFn:
    """Masks in training and at test."""
    return shop.fit(defenses.mc_dropout(shop.net(), rate=rate))


@recipe(
    "ensemble",
    about="four networks, averaged (Lakshminarayanan et al., 2017)",
    opponent=opponents.member_by_member,
    cost=4,
    learning_rate=8e-3,
)
def ensemble(shop: Workshop, members: int = 4) -> LogitsFn:
    """Networks that start apart."""
    return shop.fit(defenses.ensemble([shop.net() for _ in range(members)]))
