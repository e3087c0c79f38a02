"""Are random weights under adversarial training (Adv-BNN) more robust than PGD training?

    python examples/reproduce/contradiction_adv_bnn.py --scale cpu

Liu et al. (2019) say so, Zimmermann (2019) finds no strong evidence. Both are trained for the same epochs,
with the best of several learning rates on held-out training images, and judged under the suite, three seeds
each.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyro.distributions as dist
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
from lab import Lab, Row, figure, run

import probdefense as pd
from probdefense import attacks, defenses
from probdefense.evaluation.comparison import compare
from probdefense.objectives import elbo
from probdefense.study.findings import joined

COMMON = {"data": "digits", "learning_rate": 8e-3, "batch_size": 64, "eps": 0.2, "num_samples": 20}
SCALES = {
    "smoke": {**COMMON, "train_images": 400, "images": 30, "epochs": 6, "budget": 1000, "seeds": [0]}
    | {"rates": [8e-3], "weights": [1.0], "held_out": 30},
    "cpu": {**COMMON, "train_images": None, "images": 360, "epochs": 46, "budget": 1000, "seeds": [0, 1, 2]}
    | {"rates": [4e-3, 8e-3, 16e-3], "weights": [0.1, 1.0], "held_out": 287},
    "gpu": {**COMMON, "data": "cifar10", "eps": 8 / 255, "train_images": None, "images": 1000, "epochs": 100}
    | {
        "budget": 5000,
        "seeds": [0, 1, 2],
        "rates": [4e-3, 8e-3, 16e-3],
        "weights": [0.1, 1.0],
        "held_out": 1000,
    },
}


def systems(lab: Lab, num_data: int) -> dict[str, Any]:
    """PGD training, and Adv-BNN by weight of the KL: what builds each, what makes its objective."""

    def bayesian() -> Any:
        return defenses.bayesian(lab.net(), prior=dist.Normal(0.0, 1.0), num_data=num_data)

    found: dict[str, Any] = {"pgd training": (lambda: pd.deterministic(lab.net()), lab.adversarial)}
    for weight in lab.weights:
        weighted = partial(elbo, kl_weight=weight)
        found[f"adv_bnn, kl {weight:g}"] = (bayesian, partial(lab.adversarial, weighted))
    return found


def judged(lab: Lab, defense: Any, label: str, **options: Any) -> pd.Report:
    """Under the suite and under PGD with one draw per step, the published attack."""
    named: dict[str, Any] = {"suite": partial(attacks.suite, budget=lab.budget)}
    named["pgd_1_draw"] = pd.with_draws(partial(attacks.pgd, num_steps=20), 1)
    return lab.judged(defense, label, named, **options)


def best_rate(lab: Lab, name: str) -> float:
    """The learning rate with the best accuracy under the suite on images kept apart."""
    x, y = lab.split.train.tensors
    part = TensorDataset(x[: -lab.held_out], y[: -lab.held_out])
    held, found = (x[-lab.held_out :], y[-lab.held_out :]), {}
    for rate in lab.rates if len(lab.rates) > 1 else ():
        label = f"search-{name}-{rate:g}".replace(" ", "-").replace(",", "")
        build, objective = systems(lab, len(part))[name]
        defense = lab.trained(label, 0, build, objective(), learning_rate=rate, train=part)
        found[rate] = judged(lab, defense, label, data=held).row(attack="worst")["accuracy"]
    return max(found, key=lambda rate: found[rate]) if found else lab.rates[0]


def rows(lab: Lab) -> Iterator[Row]:
    """Accuracies, and the differences to PGD training."""
    reports: dict[str, list[pd.Report]] = {}
    for name, (build, objective) in systems(lab, lab.num_data).items():
        rate = best_rate(lab, name)
        for seed in lab.seeds:
            label = name.replace(" ", "-").replace(",", "")
            defense = lab.trained(label, seed, build, objective(), learning_rate=rate)
            report = judged(lab, defense, name, seed=seed, journal=lab.work / f"{label}-{seed}")
            reports.setdefault(name, []).append(report)
        for row in joined(reports[name]).rows:
            yield figure("Accuracy", name, row, learning_rate=rate)
    for name in reports:
        if name != "pgd training":
            for row in compare(reports[name], reports["pgd training"]).rows:
                yield figure("Difference to PGD training", name, row)


if __name__ == "__main__":
    run("contradiction_adv_bnn", __doc__, rows, SCALES)
