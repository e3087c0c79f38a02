"""The networks of the benchmarks."""

from collections.abc import Iterable

import torch
from torch import nn

import probdefense as pd


def cnn() -> nn.Sequential:
    """About 100,000 parameters in eight tensors, for 28x28 images."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(32 * 49, 56), nn.ReLU(), nn.Linear(56, 10)),
    )


def mlp() -> nn.Sequential:
    """About 270,000 parameters in six tensors, for 28x28 images."""
    layers = (nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return nn.Sequential(nn.Flatten(), *layers)


def many_tensors(layers: int = 60) -> nn.Sequential:
    """Linear layers of width 8, two tensors each: all overhead."""
    return nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(8, 8), nn.Tanh())))


def digits_nets(names: Iterable[str], epochs: int = 15) -> dict[str, pd.Defense]:
    """Defenses trained on digits, by name: ``plain``, ``rse``, ``bayesian``, ``pni``, ``both``."""
    train, _ = pd.data.digits()
    build = {
        "plain": pd.deterministic,
        "rse": pd.defenses.rse,
        "bayesian": lambda net: pd.defenses.bayesian(net, num_data=len(train)),
        "pni": pd.defenses.pni,
        "rse on bayesian": lambda net: pd.defenses.rse(pd.defenses.bayesian(net, num_data=len(train))),
    }
    made = {}
    for name in names:
        torch.manual_seed(0)
        defense = build[name](pd.models.small_cnn(width=8))
        loader = torch.utils.data.DataLoader(train, batch_size=64, shuffle=True)
        optimizer = torch.optim.Adam(defense.param_groups(), lr=4e-3)
        pd.fit(defense, loader, epochs=epochs, optimizer=optimizer, progress=False)
        made[name] = defense.eval()
    return made
