"""Runtime masking and cleansing: seconds per 100 inputs, one at a time and in groups, beside the static net.

Run: python benchmarks/adaptation.py
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.data import DataLoader

import probdefense as pd

GROUPS = (1, 10, 50)
IMAGES = 50


def seconds(run: Callable[[], object]) -> float:
    """Per 100 inputs."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 100 / IMAGES


def main() -> None:
    """Prints the table."""
    torch.manual_seed(0)
    train, test = pd.data.digits()
    base = pd.deterministic(pd.models.small_cnn())
    pd.fit(base, DataLoader(train, 64, shuffle=True), epochs=3, progress=False)
    x = test.tensors[0][:IMAGES]
    attack = partial(pd.attacks.pgd, eps=0.1, num_steps=10)
    static = seconds(lambda: base(x))
    print(f"{'inputs at a time':18} {'s per 100 inputs':>16} {'against one':>12}")
    print(f"{'static':18} {static:16.4f} {'':>12}")
    alone = None
    for group in GROUPS:
        settings = {"num_neighbors": 256, "max_epochs": 5, "learning_rate": 1e-3, "group": group}
        adaptive = pd.rmc(base, train, attack=attack, **settings)
        spent = seconds(partial(adaptive.respond, x, seed=0))
        alone = alone or spent
        print(f"{group:<18} {spent:16.2f} {alone / spent:11.1f}x")


if __name__ == "__main__":
    main()
