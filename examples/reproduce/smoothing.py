"""Randomized smoothing (Cohen et al., 2019) on digits: certified accuracy by radius, for three trainings.

    python examples/reproduce/smoothing.py --scale cpu

Gaussian augmentation, SmoothAdv (Salman et al., 2019) and consistency (Jeong and Shin, 2020), at several
noise levels, certified with alpha 0.001; the published figures are of LeNet on MNIST.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from lab import Lab, Row, figure, run

import probdefense as pd
from probdefense import defenses, objectives
from probdefense.evaluation.intervals import accuracy_interval

COMMON = {"learning_rate": 2e-3, "batch_size": 64, "seeds": [0], "num_samples": 1, "warm_up": 0.3}
SCALES = {
    "smoke": {**COMMON, "data": "digits", "train_images": 400, "images": 20, "epochs": 4, "n": 200}
    | {
        "sigmas": [0.25],
        "radii": [0.0, 0.25],
        "trainings": ["gaussian", "smooth_adversarial", "consistency"],
    },
    "cpu": {**COMMON, "data": "mnist-5k", "train_images": None, "images": 500, "epochs": 14, "n": 10_000}
    | {"sigmas": [0.25, 0.5, 1.0], "radii": [0.0, 0.5, 1.0, 1.5, 2.0]}
    | {"trainings": ["gaussian", "smooth_adversarial", "consistency"]},
    "gpu": {**COMMON, "data": "mnist", "train_images": None, "images": 500, "epochs": 150, "n": 100_000}
    | {"sigmas": [0.25, 0.5, 1.0], "radii": [0.0, 0.5, 1.0, 1.5, 2.0]}
    | {"trainings": ["gaussian", "smooth_adversarial", "consistency"]},
}
PAPER = {
    ("gaussian", 0.5): {0.0: 99.2, 0.5: 96.9, 1.0: 89.8, 1.5: 67.8},
    ("smooth_adversarial", 0.5): {0.0: 99.0, 0.5: 97.4, 1.0: 92.9, 1.5: 81.1},
    ("gaussian", 1.0): {0.0: 96.3, 0.5: 91.4, 1.0: 79.9, 1.5: 59.5, 2.0: 32.5},
}
"""Certified accuracy in percent on MNIST, by training, noise and L2 radius."""


def objective(lab: Lab, name: str, sigma: float) -> Any:
    """What is minimized; the radius of the attack grows from 0, without which large noise collapses."""
    if name == "consistency":
        return objectives.consistency(objectives.elbo, num_samples=2, weight=5.0)
    if name == "smooth_adversarial":
        inner = lab.inner_attack(eps=2 * sigma, norm=2)
        return objectives.smooth_adversarial(objectives.elbo, inner, num_samples=2)
    return objectives.elbo


def smoothed(lab: Lab, sigma: float) -> Any:
    """Noise on the raw pixels and nowhere else."""
    return defenses.rse(lab.net(), sigma_init=sigma, sigma_inner=0.0)


def rows(lab: Lab) -> Iterator[Row]:
    """Certified accuracy with its interval, by training, noise and radius."""
    x, y = lab.test
    for sigma in lab.sigmas:
        for name in lab.trainings:
            defense = lab.trained(
                f"{name}-{sigma:g}", 0, partial(smoothed, lab, sigma), objective(lab, name, sigma)
            )
            certificate = pd.certify(
                defense, x, n=lab.n, seed=0, journal=lab.work / f"certified-{name}-{sigma:g}"
            )
            right = certificate.label.eq(y)
            for radius in lab.radii:
                held = (right & (certificate.radius >= radius)).numpy()[None]
                low, high = accuracy_interval(held, crossed=False, random=False)
                shown = {"accuracy": float(held.mean()), "low": float(low), "high": float(high)}
                paper = PAPER.get((name, sigma), {}).get(radius)
                told = {"radius": radius, "norm": 2, "alpha": 0.001}
                if radius > certificate.largest:
                    told["note"] = f"beyond {certificate.largest:.3g}, the most that {lab.n} draws certify"
                yield figure(f"sigma {sigma:g}", name, shown, paper=paper, **told)
            spread = torch.quantile(certificate.radius.double(), torch.tensor([0.25, 0.5, 0.75]).double())
            low, middle, high = spread.tolist()
            shown = {"value": middle, "low": low, "high": high}
            yield figure(f"sigma {sigma:g}", name, shown, unit="L2 radius", note="median and quartiles")


if __name__ == "__main__":
    run("smoothing", __doc__, rows, SCALES)
