"""How many draws does a random self-ensemble need, and what is its noise worth under attack?

    python examples/random_self_ensemble.py [--quick]

Liu et al., 2018, Towards Robust Neural Networks via Random Self-ensemble.
"""

import sys
from functools import partial

import torch
from torch.utils.data import DataLoader

import probdefense as pd


def main(quick: bool = False) -> None:
    """Trains with noise, then prints accuracy by draws, clean and attacked."""
    torch.manual_seed(0)
    train, test = pd.data.digits()
    defense = pd.defenses.rse(pd.models.small_cnn(), sigma_init=0.2, sigma_inner=0.1)
    loader = DataLoader(train, 64, shuffle=True)
    pd.fit(defense, loader, epochs=3 if quick else 20, progress=not quick)
    defense.eval()
    x, y = test[: 40 if quick else 360]

    climb = partial(pd.attacks.pgd, eps=0.1, num_steps=5 if quick else 40)
    x_adv = climb(defense.samples(4 if quick else 16), x, y, seed=0)
    print(f"{'draws':>5s}  {'clean':>6s}  {'attacked':>8s}")
    for num_samples in (1, 2, 5, 10, 20, 50):
        clean, attacked = (
            (pd.predict(defense, points, num_samples, seed=1).label == y).float().mean()
            for points in (x, x_adv)
        )
        print(f"{num_samples:5d}  {clean:6.1%}  {attacked:8.1%}")


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
