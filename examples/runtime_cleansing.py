"""Does a defense that adapts to its inputs survive an attack that simulates it?

    python examples/runtime_cleansing.py [--quick]

Runtime masking and cleansing (Wu et al., 2020) against GMSA (Chen et al., 2022).
"""

import sys
from functools import partial

import torch
from torch.utils.data import DataLoader

import probdefense as pd
from probdefense.types import Inputs, Labels, LogitsFn, Seed


def main(quick: bool = False) -> None:
    """Prints the base, the adaptive defense under stale points, and under the attack made for it."""
    torch.manual_seed(0)
    train, test = pd.data.digits()
    base = pd.deterministic(pd.models.small_cnn(width=8))
    pd.fit(base, DataLoader(train, 64, shuffle=True), epochs=3 if quick else 15, progress=not quick)
    base.eval()
    eps, pgd = 0.15, partial(pd.attacks.pgd, num_steps=5 if quick else 20)
    adaptive = pd.rmc(
        base,
        train[:300] if quick else train,
        attack=partial(pgd, eps=eps),
        num_neighbors=16 if quick else 64,
        max_epochs=1 if quick else 4,
        learning_rate=3e-3,
        group=10,
    )

    def gmsa(logits_fn: LogitsFn, x: Inputs, y: Labels, *, eps: float, seed: Seed = None) -> Inputs:
        inner = partial(pgd, eps=eps)
        return pd.attacks.gmsa(logits_fn, x, y, attack=inner, num_rounds=1 if quick else 3, seed=seed)

    evaluate = partial(pd.evaluate, data=test[: 20 if quick else 120], eps=eps, rules=[pd.rules.mean_prob])
    report = evaluate(base, attacks={"pgd": pgd}, name="base")
    stale = {"transfer": pd.attacks.transfer(pgd, base)}
    report += evaluate(adaptive, attacks={**stale, "gmsa": gmsa}, name="rmc")
    print(report.table(("defense", "attack", "accuracy", "low", "high")))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
