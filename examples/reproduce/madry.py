"""PGD adversarial training (Madry et al., 2018) on 28 x 28 digits at 0.3: attacks, restarts, capacity.

    python examples/reproduce/madry.py --scale cpu

The paper's order: FGSM is weaker than PGD, PGD weaker than PGD with restarts, and capacity helps. Then
networks that others trained adversarially, read from ``PROBDEFENSE_DATA``, under PGD-20 and under the suite.
"""

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from lab import Lab, Row, figure, run

import probdefense as pd
from probdefense import attacks
from probdefense.study.findings import joined

COMMON = {"learning_rate": 4e-3, "batch_size": 64, "num_samples": 1, "eps": 0.3, "warm_up": 0.3}
SCALES = {
    "smoke": {**COMMON, "data": "digits", "eps": 0.2, "train_images": None, "images": 40, "epochs": 6}
    | {"seeds": [0], "restarts": 2, "budget": 200, "widths": [1]},
    "cpu": {**COMMON, "data": "mnist-5k", "train_images": None, "images": 500, "epochs": 14}
    | {"seeds": [0, 1, 2], "restarts": 5, "budget": 1000, "inner_steps": 5, "widths": [0.25, 0.5, 1]},
    "gpu": {**COMMON, "data": "mnist", "train_images": None, "images": 10_000, "epochs": 83}
    | {"seeds": [0, 1, 2], "restarts": 50, "budget": 5000, "inner_steps": 40, "widths": [0.25, 0.5, 1, 2, 4]},
}
PAPER = {"fgsm": 95.6, "pgd_40": 93.2, "pgd_100_restarts": 89.3}
"""Accuracy in percent of the paper's MNIST network (60,000 training images, a larger network)."""

OTHERS = {
    "mnist_cnn_a_adv": ("sdp/mnist_cnn_a_adv.model", 84.2),
}
"""Networks of others and their PGD-20 accuracy at 0.3 in percent, measured once with another program."""


def convolutions(lab: Lab, width: float) -> nn.Module:
    """The network of the data, wider or narrower."""
    if lab.data == "digits":
        return pd.models.small_cnn(width=round(16 * width))
    a, b, c = (max(1, round(width * size)) for size in (16, 32, 100))
    layers = [nn.Conv2d(1, a, 4, 2, 1), nn.ReLU(), nn.Conv2d(a, b, 4, 2, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(49 * b, c), nn.ReLU(), nn.Linear(c, 10))


def built(lab: Lab, width: float) -> pd.Defense:
    """The network without randomness."""
    return pd.deterministic(convolutions(lab, width))


def by_attack(lab: Lab) -> dict[str, Any]:
    """From the weakest to the strongest."""
    restarts = partial(attacks.pgd, num_steps=100, num_restarts=lab.restarts)
    return {
        "fgsm": attacks.fgsm,
        "pgd_40": partial(attacks.pgd, num_steps=40),
        "pgd_100_restarts": restarts,
        "suite": partial(attacks.suite, budget=lab.budget),
    }


def own(lab: Lab) -> Iterator[Row]:
    """Networks of every width, trained plainly and adversarially."""
    for width in lab.widths:
        for label in ("adversarial", "plain"):
            if label == "plain" and width != 1:
                continue
            reports = []
            for seed in lab.seeds:
                more = {"objective": lab.adversarial()} if label == "adversarial" else {}
                name = f"{label}-{width:g}"
                defense = lab.trained(name, seed, partial(built, lab, width), **more)
                reports.append(lab.judged(defense, name, by_attack(lab), seed=seed))
            for row in joined(reports).rows:
                known = PAPER.get(row["attack"]) if (label, width) == ("adversarial", 1) else None
                yield figure("Own networks", f"{label}, width {width:g}", row, paper=known)


def read(file: Path) -> nn.Module:
    """A stack of convolutions with stride 2 and linear layers, from the shapes in a file."""
    weights = torch.load(file, map_location="cpu", weights_only=True)
    weights = weights.get("state_dict", weights)
    if isinstance(weights, list):
        weights = weights[0]
    convolution, pad = [name for name, w in weights.items() if w.dim() == 4], 1
    layers: list[nn.Module] = []
    for name, w in weights.items():
        if w.dim() == 4:
            layers += [nn.Conv2d(w.shape[1], w.shape[0], w.shape[2], 2, pad), nn.ReLU()]
            layers += [nn.Flatten()] if name == convolution[-1] else []
        elif w.dim() == 2:
            layers += [nn.Linear(w.shape[1], w.shape[0]), nn.ReLU()]
    net = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for parameter, w in zip(net.parameters(), weights.values(), strict=True):
            parameter.copy_(w)
    return net.eval()


def others(lab: Lab) -> Iterator[Row]:
    """Networks of others, where they lie."""
    root = Path(os.environ.get("PROBDEFENSE_DATA", "."), "weights", "alpha_beta_crown")
    for name, (place, known) in OTHERS.items():
        if not (root / place).exists() or lab.data == "digits":
            continue
        net = pd.deterministic(read(root / place))
        named = {
            "pgd_20": partial(attacks.pgd, num_steps=20),
            "suite": partial(attacks.suite, budget=lab.budget),
        }
        for row in lab.judged(net, name, named).rows:
            paper = known if row["attack"] == "pgd_20" else None
            yield figure("Networks of others", name, row, paper=paper)


def rows(lab: Lab) -> Iterator[Row]:
    """Own networks, then those of others."""
    yield from own(lab)
    yield from others(lab)


if __name__ == "__main__":
    run("madry", __doc__, rows, SCALES)
