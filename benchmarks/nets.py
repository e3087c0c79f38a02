"""Small networks trained on digits, for benchmarks that need something to attack."""

from collections.abc import Iterable

import torch

import probdefense as pd


def digits_nets(names: Iterable[str], epochs: int = 15) -> dict[str, pd.Defense]:
    """Trained defenses by name: ``plain``, ``rse``, ``bayesian``."""
    train, _ = pd.data.digits()
    build = {
        "plain": pd.deterministic,
        "rse": pd.defenses.rse,
        "bayesian": lambda net: pd.defenses.bayesian(net, num_data=len(train)),
    }
    made = {}
    for name in names:
        torch.manual_seed(0)
        defense = build[name](pd.models.small_cnn(width=8))
        loader = torch.utils.data.DataLoader(train, batch_size=64, shuffle=True)
        optimizer = torch.optim.Adam(defense.param_groups(), lr=4e-3)
        pd.fit(defense, loader, epochs=epochs, optimizer=optimizer)
        made[name] = defense.eval()
    return made
