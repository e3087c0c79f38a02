"""Does drawing anew beat a frozen draw, once the attack draws anew too (random filters: RPF, CTRW)?

    python examples/reproduce/contradiction_frozen_draw.py --scale cpu

The published protocols draw one network, attack that frozen network in every step, and draw another for the
verdict: a transfer attack between draws. The same networks then face PGD on fresh draws, one per step and
many, with as many gradients.
"""

import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from lab import Lab, Row, figure, run

import probdefense as pd
from probdefense import attacks, defenses
from probdefense.study.findings import joined

COMMON = {"data": "digits", "learning_rate": 8e-3, "batch_size": 64, "eps": 0.2}
SCALES = {
    "smoke": {**COMMON, "train_images": 400, "images": 40, "epochs": 6, "num_samples": 10}
    | {"gradients": 64, "seeds": [0]},
    "cpu": {**COMMON, "train_images": None, "images": 360, "epochs": 30, "num_samples": 50}
    | {"gradients": 640, "seeds": [0, 1, 2]},
    "gpu": {**COMMON, "data": "cifar10", "eps": 8 / 255, "train_images": None, "images": 1000, "epochs": 100}
    | {"num_samples": 50, "gradients": 3200, "seeds": [0, 1, 2]},
}


def builders(lab: Lab) -> dict[str, Any]:
    """Networks with random weights, all trained adversarially with fresh draws; one without randomness."""
    return {
        "none": lambda: pd.deterministic(lab.net()),
        "random_filters": lambda: defenses.random_filters(lab.net(), num_data=lab.num_data),
        "pni": lambda: defenses.pni(lab.net()),
        "rse": lambda: defenses.rse(lab.net(), sigma_init=0.1, sigma_inner=0.1),
    }


def on_one_draw(lab: Lab) -> Any:
    """The published protocol: PGD on one draw that stays, judged on others."""
    steps = lab.gradients

    def frozen(f: Any, x: Any, y: Any, *, eps: float, norm: Any = math.inf, seed: Any = None) -> Any:
        fixed = f.freeze(1) if f.stochastic else f
        return attacks.pgd(fixed, x, y, eps=eps, norm=norm, num_steps=steps, seed=seed)

    return pd.with_draws(frozen, 1)


def by_draws(lab: Lab) -> dict[str, Any]:
    """One number of gradients, spent in four ways."""
    climbed = partial(attacks.pgd, loss=pd.losses.predictive_cross_entropy)
    return {
        "frozen_draw": on_one_draw(lab),
        "fresh_draw": pd.with_draws(partial(climbed, num_steps=lab.gradients), 1),
        "eot_16": pd.with_draws(partial(climbed, num_steps=max(1, lab.gradients // 16)), 16),
        "apgd_4": pd.with_draws(partial(attacks.apgd, num_steps=lab.gradients // 4), 4),
    }


def rows(lab: Lab) -> Iterator[Row]:
    """Every network, every protocol; one draw is the answer, as the papers have it, and the mean of many."""
    for name, build in builders(lab).items():
        reports = []
        for seed in lab.seeds:
            defense = lab.trained(name, seed, build, lab.adversarial())
            rules = (pd.rules.mean_prob, pd.rules.single_draw)
            reports.append(lab.judged(defense, name, by_draws(lab), seed=seed, rules=rules))
        for row in joined(reports).rows:
            yield figure(f"Verdict: {row['rule']}", name, row)


if __name__ == "__main__":
    run("contradiction_frozen_draw", __doc__, rows, SCALES)
