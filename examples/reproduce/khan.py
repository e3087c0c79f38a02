"""Every weight a distribution (Khan et al., 2019) and its relatives: one draw against EOT, scales, collapse.

    python examples/reproduce/khan.py --scale cpu

Networks whose every parameter is a normal distribution, trained by likelihood alone (no prior), by the ELBO,
adversarially (Adv-BNN), and with noise in proportion to the weights (PNI). All face PGD on one draw per step
and on many, at equal gradients; the published fall of Adv-BNN is 45.4 to 37.7 at 0.035 on CIFAR-10.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch

sys.path.insert(0, str(Path(__file__).parent))
from lab import Lab, Row, figure, run

import probdefense as pd
from probdefense import attacks, defenses
from probdefense.objectives import elbo, mixed

COMMON = {"data": "digits", "learning_rate": 8e-3, "batch_size": 64, "eps": 0.2, "seeds": [0]}
SCALES = {
    "smoke": {**COMMON, "train_images": 400, "images": 40, "epochs": 6, "num_samples": 10}
    | {"gradients": 64, "priors": [1.0], "weights": [1.0]},
    "cpu": {**COMMON, "train_images": None, "images": 360, "epochs": 30, "num_samples": 50}
    | {"gradients": 640, "priors": [0.1, 0.3, 1.0], "weights": [0.01, 0.1, 1.0]},
    "gpu": {**COMMON, "data": "cifar10", "eps": 8 / 255, "train_images": None, "images": 1000, "epochs": 160}
    | {"num_samples": 50, "gradients": 3200, "priors": [0.1, 0.3, 1.0], "weights": [0.01, 0.1, 1.0]},
}


def by_draws(lab: Lab) -> dict[str, Any]:
    """PGD on the mean probability, one draw per step or 20: one number of gradients."""
    climbed = partial(attacks.pgd, loss=pd.losses.predictive_cross_entropy)
    return {
        "pgd_1_draw": pd.with_draws(partial(climbed, num_steps=lab.gradients), 1),
        "pgd_20_draws": pd.with_draws(partial(climbed, num_steps=max(1, lab.gradients // 20)), 20),
        "apgd_4_draws": pd.with_draws(partial(attacks.apgd, num_steps=lab.gradients // 4), 4),
    }


def bayesian(lab: Lab, **options: Any) -> Any:
    """Mean-field weights."""
    return defenses.bayesian(lab.net(), num_data=lab.num_data, **options)


def normal(scale: float) -> Any:
    """A prior."""
    return dist.Normal(0.0, scale)


def systems(lab: Lab) -> Iterator[tuple[str, Any]]:
    """The five systems."""
    unweighted = partial(elbo, kl_weight=0.0)
    yield "khan, no prior", lab.trained("khan", 0, partial(bayesian, lab, prior=None), unweighted)
    yield "bayes by backprop", lab.trained("bayes", 0, partial(bayesian, lab, prior=normal(1.0)))
    yield "pgd training", lab.trained("madry", 0, lambda: pd.deterministic(lab.net()), lab.adversarial())
    small = partial(elbo, kl_weight=0.1)
    yield (
        "adv_bnn, kl 0.1",
        lab.trained("adv_bnn", 0, partial(bayesian, lab, prior=normal(1.0)), lab.adversarial(small)),
    )
    yield (
        "pni",
        lab.trained("pni", 0, lambda: defenses.pni(lab.net()), mixed(elbo, lab.inner_attack(), weight=0.5)),
    )


def scales(named: dict[str, Any]) -> Iterator[Row]:
    """The learned standard deviations, by layer: median and quartiles."""
    for name in ("khan, no prior", "bayes by backprop"):
        for site in named[name].sites.values():
            deviations = site.moments()[1].detach().sqrt()
            for path, values in site.views(deviations).items():
                low, middle, high = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75])).tolist()
                shown = {"value": middle, "low": low, "high": high}
                yield figure("Learned scales", name, shown, layer=path, note="median and quartiles")


def swept(lab: Lab) -> Iterator[Row]:
    """Adversarial ELBO under other priors and weights."""
    for prior in lab.priors:
        for weight in lab.weights:
            objective = lab.adversarial(partial(elbo, kl_weight=weight))
            label = f"prior-{prior:g}-kl-{weight:g}"
            defense = lab.trained(label, 0, partial(bayesian, lab, prior=normal(prior)), objective)
            for row in lab.judged(defense, label, {"apgd_4_draws": by_draws(lab)["apgd_4_draws"]}).rows:
                yield figure("Prior and KL weight", f"Normal(0, {prior:g}), weight {weight:g}", row)


def rows(lab: Lab) -> Iterator[Row]:
    """Systems under one draw and many, scales, sweep."""
    named = dict(systems(lab))
    for name, defense in named.items():
        for row in lab.judged(defense, name.replace(" ", "-"), by_draws(lab)).rows:
            paper = (
                {"pgd_1_draw": 45.4, "pgd_20_draws": 37.7}.get(row["attack"]) if "adv_bnn" in name else None
            )
            yield figure("One draw against many", name, row, paper=paper)
    yield from scales(named)
    yield from swept(lab)


if __name__ == "__main__":
    run("khan", __doc__, rows, SCALES)
