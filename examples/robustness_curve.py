"""From which radius on is one defense more robust than another?

Attacks at a few radii give thresholds, one per image and defense; a hierarchical model turns them into
curves with bands, and into the probability that one defense is the better one at any radius.

    python examples/robustness_curve.py --quick --out curves
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

import probdefense as pd

RADII = [0.03, 0.06, 0.1, 0.15, 0.2]


def trained(epochs: int, eps: float | None) -> pd.Defense:
    """A network, adversarially trained at a radius or not at all."""
    torch.manual_seed(0)
    defense = pd.deterministic(pd.models.small_cnn())
    objective = pd.objectives.elbo
    if eps is not None:
        objective = pd.objectives.adversarial(objective, partial(pd.attacks.pgd, eps=eps, num_steps=4))
    loader = DataLoader(pd.data.digits().train, batch_size=64, shuffle=True)
    pd.fit(defense, loader, epochs=epochs, objective=objective, progress=False)
    return defense.eval()


def main(quick: bool = False, out: str | None = None) -> pd.analysis.RobustnessCurve:
    """Trains, attacks, fits the curves, and prints them."""
    x, y = (part[: 100 if quick else 360] for part in pd.data.digits().test.tensors)
    pgd = {"pgd": partial(pd.attacks.pgd, num_steps=5 if quick else 40)}
    reports = [
        pd.evaluate(trained(4 if quick else 20, eps), (x, y), pgd, eps=RADII, name=name)
        for name, eps in (("plain", None), ("adversarial", 0.15))
    ]
    draws = 250 if quick else 500
    curve = pd.analysis.robustness_curve(reports[0] + reports[1], num_samples=draws, num_warmup=draws)

    print("radius  plain: 95 % band   adversarial: 95 % band   P(adversarial is better)")
    bands, better = (
        [100 * curve.band(name) for name in curve.defenses],
        curve.dominates("adversarial", "plain"),
    )
    for k in range(0, len(curve.eps), 10):
        (low, _, high), (low2, _, high2) = (band[:, k] for band in bands)
        print(
            f"{curve.eps[k]:.3f}   {low:5.1f} to {high:5.1f}     {low2:5.1f} to {high2:5.1f}{better[k]:20.3f}"
        )
    print(f"R-hat {curve.r_hat:.3f}, effective draws {curve.ess:.0f}")
    sure = curve.eps[np.flatnonzero(better > 0.99)[:1]]
    print(f"better with probability .99 from radius {sure[0]:.3f} on" if len(sure) else "never certain")
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        pd.analysis.robustness_curves(curve).figure.savefig(Path(out) / "curves.png", dpi=150)
    return curve


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer images, epochs and draws")
    parser.add_argument("--out", help="folder for the picture")
    given = parser.parse_args()
    main(given.quick, given.out)
