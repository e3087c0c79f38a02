"""JumpReLU (Erichson et al., 2019): what the jump costs, what it seems to give, and what BPDA leaves of it.

    python examples/reproduce/jump_relu.py --scale cpu

The jump is put on trained networks, plain and adversarially trained, without retraining. Three attacks of
equal gradients: PGD on the network itself, whose gradient the jump hides; points made for the network without
the jump; and BPDA, the true forward pass with the gradient of a smoothed jump.
"""

import math
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from lab import Lab, Row, figure, run
from madry import read

import probdefense as pd
from probdefense import attacks
from probdefense.defenses import jump_relu, surrogates

COMMON = {"learning_rate": 4e-3, "batch_size": 64, "num_samples": 1, "eps": 0.3, "seeds": [0]}
SCALES = {
    "smoke": {**COMMON, "data": "digits", "eps": 0.2, "train_images": None, "images": 40, "epochs": 6}
    | {"steps": 20, "kappas": [0.0, 0.2]},
    "cpu": {**COMMON, "data": "mnist-5k", "train_images": None, "images": 500, "epochs": 14}
    | {"steps": 100, "inner_steps": 5, "kappas": [0.0, 0.1, 0.2, 0.4, 0.8]},
    "gpu": {**COMMON, "data": "mnist", "train_images": None, "images": 10_000, "epochs": 50}
    | {"steps": 200, "inner_steps": 40, "kappas": [0.0, 0.1, 0.2, 0.4, 0.8, 1.5]},
}


def by_attack(base: Any, jumped: Any, steps: int) -> dict[str, Any]:
    """PGD, transfer from the base, BPDA: one number of gradients."""
    pgd = partial(attacks.pgd, num_steps=steps)

    def bpda(f: Any, x: Any, y: Any, *, eps: float, norm: Any = math.inf, seed: Any = None) -> Any:
        with attacks.bpda(jumped, surrogates(jumped)):
            return pgd(f, x, y, eps=eps, norm=norm, seed=seed)

    def transfer(f: Any, x: Any, y: Any, *, eps: float, norm: Any = math.inf, seed: Any = None) -> Any:
        return pgd(base, x, y, eps=eps, norm=norm, seed=seed)

    for attack in (bpda, transfer):
        attack.fingerprint = f"{attack.__name__} {steps}"  # type: ignore[attr-defined]
    return {"pgd": pgd, "transfer": transfer, "bpda": bpda}


def bases(lab: Lab) -> Iterator[tuple[str, Any, float]]:
    """Trained networks and the radius of their attack."""
    plain = lab.trained("plain", 0, lambda: pd.deterministic(lab.net()))
    yield "plain, own", plain, lab.eps / 3
    robust = lab.trained("robust", 0, lambda: pd.deterministic(lab.net()), lab.adversarial())
    yield "adversarially trained, own", robust, lab.eps
    place = Path(
        os.environ.get("PROBDEFENSE_DATA", "."), "weights/alpha_beta_crown/sdp/mnist_cnn_a_adv.model"
    )
    if place.exists() and lab.data != "digits":
        yield "adversarially trained, of others", pd.deterministic(read(place)), lab.eps


def rows(lab: Lab) -> Iterator[Row]:
    """Every base with every threshold."""
    for name, base, eps in bases(lab):
        for kappa in lab.kappas:
            jumped = jump_relu(base, kappa=kappa)
            label = f"{name}-{kappa:g}".replace(" ", "-").replace(",", "")
            for row in lab.judged(jumped, label, by_attack(base, jumped, lab.steps), eps=eps).rows:
                yield figure(f"{name}, radius {eps:g}", f"kappa {kappa:g}", row)


if __name__ == "__main__":
    run("jump_relu", __doc__, rows, SCALES)
