"""Is randomness needed, or is the best fixed draw of a random network as robust (Pinot 2020, Gnecco 2023)?

    python examples/reproduce/contradiction_randomness.py --scale cpu

One trained random network answered in four ways: by the mean probability of many draws, by one draw, by the
mean of the network with its noise at zero, and by the best of several fixed draws, chosen on training images
under attack. Every way of answering faces APGD on exactly that answer, with as many gradients.
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
from probdefense.study.findings import joined

COMMON = {"data": "digits", "learning_rate": 8e-3, "batch_size": 64, "eps": 0.2}
SCALES = {
    "smoke": {**COMMON, "train_images": 400, "images": 40, "epochs": 6, "num_samples": 10}
    | {"gradients": 64, "fixed": 2, "seeds": [0]},
    "cpu": {**COMMON, "train_images": None, "images": 360, "epochs": 30, "num_samples": 50}
    | {"gradients": 640, "fixed": 8, "seeds": [0, 1, 2]},
    "gpu": {**COMMON, "data": "cifar10", "eps": 8 / 255, "train_images": None, "images": 1000, "epochs": 100}
    | {"num_samples": 50, "gradients": 3200, "fixed": 16, "seeds": [0, 1, 2]},
}


def builders(lab: Lab) -> dict[str, Any]:
    """Random weights, noise in proportion to them, noise on activations."""
    return {
        "bayesian": lambda: defenses.bayesian(lab.net(), prior=dist.Normal(0.0, 1.0), num_data=lab.num_data),
        "pni": lambda: defenses.pni(lab.net()),
        "rse": lambda: defenses.rse(lab.net(), sigma_init=0.1, sigma_inner=0.1),
    }


def apgd(lab: Lab, draws: int) -> Any:
    """One number of gradients, whatever the draws per step."""
    return pd.with_draws(partial(attacks.apgd, num_steps=max(1, lab.gradients // draws)), draws)


def best_fixed(lab: Lab, defense: Any, seed: int) -> Any:
    """The fixed draw that keeps most of 200 training images under attack."""
    x, y = (part[:200] for part in lab.split.train.tensors)
    drawn = [
        defense.freeze(1, generator=torch.Generator().manual_seed(1000 * seed + k)) for k in range(lab.fixed)
    ]
    attack = partial(attacks.apgd, num_steps=20, eps=lab.eps, seed=seed)
    kept = [float((fixed(attack(fixed, x, y))[0].argmax(1) == y).float().mean()) for fixed in drawn]
    return drawn[max(range(len(kept)), key=lambda k: kept[k])]


def answers(lab: Lab, defense: Any, seed: int) -> Iterator[tuple[str, Any, Any, Any]]:
    """How it answers, the function, its attack, its rule."""
    yield "mean of many draws", defense, apgd(lab, 4), pd.rules.mean_prob
    yield "one draw", defense, apgd(lab, 4), pd.rules.single_draw
    yield "noise at zero", defense.mean(), apgd(lab, 1), pd.rules.mean_prob
    yield "best fixed draw", best_fixed(lab, defense, seed), apgd(lab, 1), pd.rules.mean_prob


def rows(lab: Lab) -> Iterator[Row]:
    """Every network, every way of answering."""
    for name, build in builders(lab).items():
        found: dict[str, list[pd.Report]] = {}
        for seed in lab.seeds:
            objective = lab.adversarial(
                partial(pd.objectives.elbo, kl_weight=0.1 if name == "bayesian" else 1.0)
            )
            defense = lab.trained(name, seed, build, objective)
            for way, function, attack, rule in answers(lab, defense, seed):
                options = {"seed": seed, "rules": (rule,), "journal": None}
                found.setdefault(way, []).append(lab.judged(function, way, {"apgd": attack}, **options))
        for way, reports in found.items():
            for row in joined(reports).rows:
                yield figure(name, way, row)


if __name__ == "__main__":
    run("contradiction_randomness", __doc__, rows, SCALES)
