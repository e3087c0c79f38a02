"""What can be certified of two public posteriors, which nobody here trained.

    PROBDEFENSE_DATA=... python benchmarks/posteriors.py [images]

Certified and right, with the 95 % interval over images, on l-inf balls, for the posteriors of
[deepbayes](https://github.com/matthewwicker/deepbayes) (784-128-10) and the first test images of MNIST;
beside it what boxes of weights alone certify, and the quartiles of the bound.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import probdefense as pd

RADII = (0.0, 0.005, 0.01, 0.02, 0.03)


def posterior(name: str) -> pd.Defense:
    """A file of means and variances as a defense."""
    kept = np.load(
        Path(os.environ["PROBDEFENSE_DATA"], "weights", "deepbayes", f"{name}_mnist_posterior.npz")
    )
    net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    means, variances = ([torch.tensor(kept[f"{kind}{i}"].T) for i in range(4)] for kind in ("mean", "var"))
    with torch.no_grad():
        for parameter, mean in zip(net.parameters(), means, strict=True):
            parameter.copy_(mean)
        defense = pd.defenses.bayesian(net)
        scales = torch.cat([variance.flatten() for variance in variances]).sqrt()
        guide: Any = defense.guide
        guide.posteriors["weights"].log_scale.copy_(scales.log())
    return defense


def main(count: int = 100) -> None:
    torch.set_num_threads(1)
    x, y = (part[:count] for part in pd.data.load("mnist", Path(os.environ["PROBDEFENSE_DATA"])).test.tensors)
    for name in ("robust", "vogn"):
        defense = posterior(name)
        for eps in RADII:
            found = pd.certify_posterior(defense, x.flatten(1), eps=eps, num_boxes=4)
            row, boxes = found.accuracy(y), float((found.boxes > 0.5).double().mean())
            shares = ", ".join(f"{value:.3f}" for value in np.quantile(found.probability, (0.25, 0.5, 0.75)))
            print(
                f"{name}, eps {eps:g}: {row['accuracy']:.0%} [{row['low']:.0%}, {row['high']:.0%}]", end="; "
            )
            print(f"boxes alone {boxes:.0%}; quartiles of the bound {shares}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
