"""What training for certificates is worth on digits, and whether MACER holds what it claims.

    python benchmarks/certificates.py [--quick]

One small network, noise on its pixels in training (stability adds its own) and at test, equal epochs;
certified accuracy of 200 test images (n = 1000, alpha = .001) and the average certified radius, over training
seeds. MACER (Zhai et al., 2020, [MACER](https://arxiv.org/abs/2001.02378)) maximizes the radius of the soft
vote; it stands here only.
"""

import sys
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import probdefense as pd
from probdefense.objectives import consistency, elbo, smooth_adversarial, stability
from probdefense.types import Objective

RADII = (0.0, 0.25, 0.5, 0.75, 1.0)


def macer(num_samples: int, weight: float, temperature: float = 1 / 16, bound: float = 8.0) -> Objective:
    """The cross-entropy of the soft vote plus a hinge on its radius, where it is right."""

    def objective(defense: Any, x: Tensor, y: Tensor, **_: Any) -> Tensor:
        logits = torch.stack([defense.step(x, y, defense.draw(x)).logits for _ in range(num_samples)])
        own = logits.softmax(-1).mean(0)
        soft = (logits / temperature).softmax(-1).mean(0)
        loss = -own.gather(1, y[:, None]).squeeze(1).log()
        top = soft.topk(2, dim=1)
        gap = torch.special.ndtri(top.values.clamp(1e-5, 1 - 1e-5))
        margin = gap[:, 0] - gap[:, 1]
        counts = (top.indices[:, 0] == y) & (margin < bound)
        sigma = float(defense.input_noise[1])
        return (loss + weight * sigma / 2 * torch.where(counts, bound - margin, 0.0)).mean()

    return objective


def methods(sigma: float) -> dict[str, Objective]:
    """Objectives by name."""
    attack = partial(pd.attacks.pgd, norm=2, eps=2 * sigma, num_steps=4, random_start=False)
    return {
        "Gaussian": elbo,
        "Gaussian, 2 copies": partial(elbo, num_particles=2),
        "stability": stability(elbo, sigma, 2.0),
        "consistency": consistency(elbo, 2, 10.0),
        "SmoothAdv": smooth_adversarial(elbo, attack, num_samples=2),
        "consistency + SmoothAdv": smooth_adversarial(consistency(elbo, 2, 10.0), attack, num_samples=2),
        "MACER": macer(16, 12.0 if sigma < 0.4 else 4.0),
    }


def trained(objective: Objective, sigma: float, seed: int, epochs: int, clean: bool) -> pd.Defense:
    """A small network with noise on its pixels."""
    torch.manual_seed(seed)
    train, _ = pd.data.digits()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    noisy = partial(pd.defenses.rse, sigma_init=sigma, sigma_inner=0.0, before_linear=True)
    defense = pd.deterministic(net) if clean else noisy(net)
    optimizer = torch.optim.Adam(defense.parameters(), lr=3e-3)
    loader = DataLoader(train, 64, shuffle=True)
    pd.fit(defense, loader, epochs=epochs, objective=objective, optimizer=optimizer, progress=False)
    return (noisy(net) if clean else defense).eval()


def main() -> None:
    quick = "--quick" in sys.argv
    seeds, epochs = (1, 2) if quick else (3, 20)
    x, y = pd.data.digits().test.tensors
    x, y = x[:200], y[:200]
    for sigma in (0.25, 0.5):
        print(
            f"sigma {sigma}; certified accuracy % at {RADII}, average radius (standard deviation over seeds)"
        )
        for name, objective in methods(sigma).items():
            start, curves, averages = time.perf_counter(), [], []
            for seed in range(seeds):
                defense = trained(objective, sigma, seed, epochs, name == "stability")
                found = pd.certify(defense, x, n0=50, n=1000, seed=seed)
                curves.append([row["accuracy"] for row in found.curve(y, RADII)])
                averages.append(float(torch.where(found.label == y, found.radius, 0.0).mean()))
            line = " ".join(f"{100 * value:5.1f}" for value in np.mean(curves, axis=0))
            spread = np.std(averages, ddof=1) if seeds > 1 else 0.0
            seconds = (time.perf_counter() - start) / seeds
            print(f"{name:26s} {line}  {np.mean(averages):.3f} ({spread:.3f})  {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
