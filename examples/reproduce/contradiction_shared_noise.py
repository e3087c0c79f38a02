"""Does a noise defense withstand EOT, or does its evaluation share one draw among the copies (L2P, WCA)?

    python examples/reproduce/contradiction_shared_noise.py --scale cpu

Where noise has no batch axis, the 30 copies that an EOT attack makes are one batch and see the same draw: EOT
with 30 draws is then EOT with one. The same networks face both, with as many steps, on fresh verdict draws.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from lab import Lab, Row, figure, run

import probdefense as pd
from probdefense import attacks, defenses, objectives
from probdefense.study.findings import joined

COMMON = {"data": "digits", "learning_rate": 8e-3, "batch_size": 64, "eps": 0.1}
SCALES = {
    "smoke": {**COMMON, "train_images": 400, "images": 40, "epochs": 6, "num_samples": 10}
    | {"steps": 10, "copies": 8, "seeds": [0]},
    "cpu": {**COMMON, "train_images": None, "images": 360, "epochs": 30, "num_samples": 50}
    | {"steps": 40, "copies": 30, "seeds": [0, 1, 2]},
    "gpu": {**COMMON, "data": "cifar10", "eps": 8 / 255, "train_images": None, "images": 1000, "epochs": 100}
    | {"num_samples": 50, "steps": 100, "copies": 30, "seeds": [0, 1, 2]},
}


class SharedByCopies:
    """A random function whose draws of one call are all the same, as noise without a batch axis is."""

    stochastic = True

    def __init__(self, logits_fn: Any):
        self.logits_fn = logits_fn

    def __call__(self, x: Any, num_samples: int | None = None) -> Any:
        """One fresh draw, shared by the whole batch and repeated."""
        return self.logits_fn.freeze(1)(x).expand(num_samples or 1, -1, -1)


def eot(lab: Lab, copies: int, shared: bool) -> Any:
    """PGD that averages over copies, whose draws are independent or one and the same."""

    def averaged(f: Any, x: Any, y: Any, *, eps: float, norm: Any = math.inf, seed: Any = None) -> Any:
        seen = SharedByCopies(f) if shared and f.stochastic else f
        torch.manual_seed(int(seed[0]) % 2**31 if hasattr(seed, "__len__") else int(seed or 0))
        return attacks.pgd(seen, x, y, eps=eps, norm=norm, num_steps=lab.steps, seed=seed)

    return pd.with_draws(averaged, copies)


def builders(lab: Lab) -> dict[str, Any]:
    """Noise with trained scales, kept from collapse by a reward, and plain RSE."""
    rewarded = objectives.rewarded(objectives.elbo, weight=0.1)
    return {
        "rse": (lambda: defenses.rse(lab.net(), sigma_init=0.1, sigma_inner=0.1), objectives.elbo),
        "wca": (lambda: defenses.wca(lab.net()), rewarded),
    }


def rows(lab: Lab) -> Iterator[Row]:
    """EOT with independent and with shared copies, and one copy."""
    named = {"eot_1": eot(lab, 1, False), "eot_shared": eot(lab, lab.copies, True)}
    named["eot_independent"] = eot(lab, lab.copies, False)
    for name, (build, objective) in builders(lab).items():
        reports = []
        for seed in lab.seeds:
            defense = lab.trained(name, seed, build, objective)
            reports.append(lab.judged(defense, name, named, seed=seed, journal=None))
        for row in joined(reports).rows:
            yield figure(f"EOT over {lab.copies} copies", name, row)


if __name__ == "__main__":
    run("contradiction_shared_noise", __doc__, rows, SCALES)
