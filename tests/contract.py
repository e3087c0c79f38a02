"""What every builder, attack and objective promises, checked on whatever is registered here."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import probdefense as pd
from probdefense.objectives import adversarial, elbo
from tests.worlds import tiny_batch, tiny_net

N = 50

BUILDERS: dict[str, Callable[[nn.Module], pd.Defense]] = {
    "deterministic": lambda net: pd.deterministic(net, num_data=N),
    "rse": partial(pd.defenses.rse, num_data=N),
    "rse learned": partial(pd.defenses.rse, num_data=N, scale="learned", scale_shape="channel"),
    "rse variational": partial(
        pd.defenses.rse, num_data=N, scale="variational", scale_shape="element", example=tiny_batch()[0]
    ),
    "rse everywhere": partial(pd.defenses.rse, num_data=N, before_linear=True, init_at="conv"),
    "bayesian": partial(pd.defenses.bayesian, num_data=N),
    "bayesian per tensor": partial(pd.defenses.bayesian, num_data=N, layout="per_tensor"),
    "bayesian without prior": partial(pd.defenses.bayesian, num_data=N, prior=None),
    "bayesian on rse": lambda net: pd.defenses.bayesian(pd.defenses.rse(net), num_data=N),
    "rse on bayesian": lambda net: pd.defenses.rse(pd.defenses.bayesian(net, num_data=N)),
}

FIXED_BUDGET = {
    "fgsm": pd.attacks.fgsm,
    "fgsm from a random start": partial(pd.attacks.fgsm, random_start=True),
    "pgd": partial(pd.attacks.pgd, num_steps=4),
    "pgd with restarts": partial(pd.attacks.pgd, num_steps=2, num_restarts=2),
}

NORMS_OF: dict[str, tuple[float, ...]] = {}
"""Norms of attacks that do not have all three."""

MIN_NORM: dict[str, Callable[..., torch.Tensor]] = {}

OBJECTIVES = {
    "elbo": elbo,
    "elbo of two particles": partial(elbo, num_particles=2),
    "elbo without KL": partial(elbo, kl_weight=0.0),
    "adversarial": adversarial(elbo, partial(pd.attacks.pgd, eps=0.1, num_steps=2)),
    "adversarial on the same draw": adversarial(
        elbo, partial(pd.attacks.pgd, eps=0.1, num_steps=2), same_draw=True
    ),
}


def defended(name: str) -> pd.Defense:
    """The builder's defense of a tiny network, with noise large enough to see."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return BUILDERS[name](tiny_net())
