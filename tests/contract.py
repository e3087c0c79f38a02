"""What every builder, attack and objective promises, checked on whatever is registered here."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import nn

import probdefense as pd
from probdefense.defenses import MultiplicativeLogNormal
from probdefense.logits.losses import dlr
from probdefense.objectives import (
    adversarial,
    consistency,
    distilled,
    elbo,
    gaussian_augmented,
    harmonic,
    information_gain,
    mixed,
    multi_sample,
    rewarded,
    smooth_adversarial,
    stability,
    svgd,
    trades,
    warm_up,
)
from tests.worlds import tiny_batch, tiny_net

N = 50


def by_kind(name: str, tensor: torch.Tensor) -> type:
    """Multiplicative noise on weights, additive on biases."""
    return dist.Laplace if name.endswith("bias") else MultiplicativeLogNormal


def around(net: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Samples of the layers but the first, whose mean is the network."""
    state = {n: v for n, v in net.state_dict().items() if n[0] in "247" and v.is_floating_point()}
    return [{n: v + size * v.abs() for n, v in state.items()} for size in (-0.4, -0.3, -0.2, 0.2, 0.3, 0.4)]


def center() -> Any:
    """A prior around a network that is the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return pd.priors.centered(tiny_net(), 0.1)


BUILDERS: dict[str, Callable[[nn.Module], pd.Defense]] = {
    "deterministic": lambda net: pd.deterministic(net, num_data=N),
    "rse": partial(pd.defenses.rse, num_data=N),
    "rse learned": partial(pd.defenses.rse, num_data=N, scale="learned", scale_shape="channel"),
    "rse variational": partial(
        pd.defenses.rse, num_data=N, scale="variational", scale_shape="element", example=tiny_batch()[0]
    ),
    "rse of full covariance": partial(
        pd.defenses.rse, num_data=N, scale="learned", covariance="full", before_linear=True, init_at="conv"
    ),
    "rse of low rank": partial(pd.defenses.rse, num_data=N, scale="learned", covariance="low_rank"),
    "rse after blocks": partial(
        pd.defenses.rse, num_data=N, after="block", where=lambda path, _: path in ("3", "5")
    ),
    "wca": partial(pd.defenses.wca, num_data=N),
    "wca on bayesian": lambda net: pd.defenses.wca(pd.defenses.bayesian(net, num_data=N)),
    "conditional_noise": partial(pd.defenses.conditional_noise, num_data=N),
    "conditional_noise on rse": lambda net: pd.defenses.conditional_noise(
        pd.defenses.rse(net), "4", num_data=N
    ),
    "random_transforms": partial(pd.defenses.random_transforms, num_data=N),
    "random_transforms learned": lambda net: pd.defenses.random_transforms(
        net,
        [pd.nn.transforms.Shift(0.2, learned=True), pd.nn.transforms.Color(0.5, learned=True)],
        count=2,
        num_data=N,
    ),
    "random_transforms on bayesian": lambda net: pd.defenses.random_transforms(
        pd.defenses.bayesian(net, num_data=N),
        [pd.nn.transforms.Rotation(20.0), pd.nn.transforms.PixelNoise(0.1)],
    ),
    "rse everywhere": partial(pd.defenses.rse, num_data=N, before_linear=True, init_at="conv"),
    "bayesian": partial(pd.defenses.bayesian, num_data=N),
    "bayesian of low rank": partial(pd.defenses.bayesian, num_data=N, rank=2),
    "bayesian below a ceiling": partial(
        pd.defenses.bayesian, num_data=N, floor=0.01, init_scale=0.05, ceiling=0.1
    ),
    "bayesian of learned prior": partial(
        pd.defenses.bayesian, num_data=N, prior=pd.priors.learned_scale(0.5)
    ),
    "bayesian of a hierarchy": partial(
        pd.defenses.bayesian, num_data=N, prior=pd.priors.hierarchical(dist.HalfCauchy(1.0))
    ),
    "bayesian around a center": partial(pd.defenses.bayesian, num_data=N, prior=center()),
    "bayesian per tensor": partial(pd.defenses.bayesian, num_data=N, layout="per_tensor"),
    "bayesian without prior": partial(pd.defenses.bayesian, num_data=N, prior=None),
    "bayesian on rse": lambda net: pd.defenses.bayesian(pd.defenses.rse(net), num_data=N),
    "rse on bayesian": lambda net: pd.defenses.rse(pd.defenses.bayesian(net, num_data=N)),
    "bayesian of two families": partial(
        pd.defenses.bayesian, num_data=N, family=by_kind, init_scale=0.1, floor=0.01
    ),
    "pni": partial(pd.defenses.pni, num_data=N),
    "pni on outputs": partial(pd.defenses.pni, num_data=N, place="output", scale_shape="channel"),
    "pni on bayesian": lambda net: pd.defenses.pni(pd.defenses.bayesian(net, num_data=N)),
    "jump_relu": partial(pd.defenses.jump_relu, num_data=N, kappa=0.05),
    "jump_relu random": partial(pd.defenses.jump_relu, num_data=N, kappa=dist.Uniform(0.0, 0.3)),
    "jump_relu learned": partial(
        pd.defenses.jump_relu, num_data=N, kappa=dist.Normal(0.2, 0.1), learned=True
    ),
    "brelu": partial(pd.defenses.brelu, num_data=N),
    "mc_dropout": partial(pd.defenses.mc_dropout, num_data=N, rate=0.4),
    "ensemble": lambda net: pd.defenses.ensemble([net, tiny_net()], num_data=N),
    "random_filters": partial(pd.defenses.random_filters, num_data=N, init_scale=0.6),
    "random_filters on bayesian": lambda net: pd.defenses.random_filters(
        pd.defenses.bayesian(net, num_data=N)
    ),
    "particles": lambda net: pd.defenses.particles([net, tiny_net()], num_data=N),
    "from_samples": lambda net: pd.defenses.from_samples(net, around(net), num_data=N),
    "rse on from_samples": lambda net: pd.defenses.rse(
        pd.defenses.from_samples(net, around(net)), num_data=N
    ),
    "rse on ensemble": lambda net: pd.defenses.rse(pd.defenses.ensemble([net, tiny_net()]), num_data=N),
}

DETERMINISTIC = {"deterministic", "jump_relu", "jump_relu learned", "brelu"}
"""Builders that make nothing random."""

ENSEMBLES = {"ensemble", "particles", "rse on ensemble"}
"""Several networks: names get the prefix of a member, and a Pyro program trains one member per step."""

DISCRETE = {"mc_dropout", "from_samples", "rse on from_samples", *ENSEMBLES}
"""Builders with discrete sites, which Pyro's mean-field ELBO refuses."""

OTHER_BASE = {name for name in BUILDERS if name.startswith("jump_relu")} | {"brelu", *ENSEMBLES}
"""Builders whose static base is another function than the network that was given."""

FIXED_BUDGET: dict[str, Callable[..., torch.Tensor]] = {
    "fgsm": pd.attacks.fgsm,
    "fgsm from a random start": partial(pd.attacks.fgsm, random_start=True),
    "r_fgsm": pd.attacks.r_fgsm,
    "bim": partial(pd.attacks.bim, num_steps=4),
    "mim": partial(pd.attacks.mim, num_steps=4),
    "mim by signs": partial(pd.attacks.mim, num_steps=4, repeats=2, signs=True),
    "pgd": partial(pd.attacks.pgd, num_steps=4),
    "pgd with restarts": partial(pd.attacks.pgd, num_steps=2, num_restarts=2),
    "apgd": partial(pd.attacks.apgd, num_steps=8),
    "apgd, targets": partial(pd.attacks.apgd, num_steps=5, num_targets=2, loss=dlr),
    "square": partial(pd.attacks.square, max_queries=200),
    "nes": partial(pd.attacks.nes, max_queries=500, num_directions=12),
    "spsa": partial(pd.attacks.spsa, max_queries=500, num_directions=12),
    "arc": partial(pd.attacks.arc, num_steps=4),
    "worst_of": pd.attacks.worst_of([pd.attacks.fgsm, partial(pd.attacks.mim, num_steps=3)]),
    "suite": partial(pd.attacks.suite, budget=1000),
}

MIN_NORM: dict[str, Callable[..., torch.Tensor]] = {
    "cw": partial(pd.attacks.cw, num_steps=20, num_searches=4, init_c=0.1),
    "ead": partial(pd.attacks.ead, num_steps=20, num_searches=4, init_c=0.1),
    "ddn": partial(pd.attacks.ddn, num_steps=20),
    "fmn": partial(pd.attacks.fmn, num_steps=20),
    "fmn L1": partial(pd.attacks.fmn, num_steps=20, norm=1),
    "deepfool": pd.attacks.deepfool,
    "zoo": partial(pd.attacks.zoo, max_queries=2500, num_searches=2),
    "hop_skip_jump": partial(pd.attacks.hop_skip_jump, max_queries=1500, num_directions=40),
}

NORMS_OF: dict[str, tuple[float, ...]] = {"square": (2, math.inf)}
"""Norms of attacks that do not have all three."""

STAY_AT_ERRORS = {"arc", "suite", *MIN_NORM}
"""Attacks that leave an example alone that is wrong already."""

OBJECTIVES = {
    "elbo": elbo,
    "elbo of two particles": partial(elbo, num_particles=2),
    "elbo without KL": partial(elbo, kl_weight=0.0),
    "adversarial": adversarial(elbo, partial(pd.attacks.pgd, eps=0.1, num_steps=2)),
    "adversarial on the same draw": adversarial(
        elbo, partial(pd.attacks.pgd, eps=0.1, num_steps=2), same_draw=True
    ),
    "adversarial, clean statistics": adversarial(elbo, partial(pd.attacks.fgsm, eps=0.1), bn_stats="clean"),
    "fast adversarial, warming up": adversarial(
        elbo, warm_up(partial(pd.attacks.fgsm, random_start=True), eps=0.1, num_steps=3), bn_stats="both"
    ),
    "multi_sample": multi_sample(3),
    "mixed by chance": mixed(elbo, partial(pd.attacks.fgsm, eps=0.1), probability=0.5),
    "mixed by weight": mixed(elbo, partial(pd.attacks.fgsm, eps=0.1), weight=0.5),
    "distilled": distilled(pd.deterministic(tiny_net()), temperature=20.0),
    "gaussian_augmented": gaussian_augmented(elbo, sigma=0.1),
    "rewarded": rewarded(elbo, harmonic(0.1, num_steps=2), reward=lambda defense, x: defense(x).std()),
    "svgd": svgd(),
    "information_gain": information_gain(elbo, partial(pd.attacks.pgd, eps=0.1, num_steps=2), weight=0.5),
    "trades": trades(partial(pd.attacks.pgd, eps=0.1, num_steps=2), beta=2.0),
    "smooth_adversarial": smooth_adversarial(elbo, partial(pd.attacks.pgd, norm=2, eps=0.3, num_steps=2)),
    "smooth_adversarial, consistent": smooth_adversarial(
        consistency(elbo, 2, 5.0), partial(pd.attacks.pgd, norm=2, eps=0.3, num_steps=2)
    ),
    "consistency": consistency(elbo, num_samples=2, weight=5.0),
    "stability": stability(elbo, sigma=0.1, weight=2.0),
}


def defended(name: str) -> pd.Defense:
    """The builder's defense of a tiny network, with noise large enough to see."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return BUILDERS[name](tiny_net())
