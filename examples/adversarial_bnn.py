"""Does adversarial training help a Bayesian network?

    python examples/adversarial_bnn.py [--quick]

Bayes by backprop (Blundell et al., 2015) against Adv-BNN (Liu et al., 2019): one builder, two objectives.
Prior N(0, 1), KL weight 1.
"""

import sys
from functools import partial

import torch
from torch.utils.data import DataLoader

import probdefense as pd
from probdefense.objectives import adversarial, elbo
from probdefense.types import Objective


def trained(objective: Objective, epochs: int, progress: bool) -> pd.Defense:
    """Mean-field weights, trained by an objective."""
    torch.manual_seed(0)
    train = pd.data.digits().train
    defense = pd.defenses.bayesian(pd.models.small_cnn(), num_data=len(train))
    optimizer = torch.optim.Adam(defense.param_groups(), lr=4e-3)
    loader = DataLoader(train, 64, shuffle=True)
    pd.fit(defense, loader, epochs=epochs, objective=objective, optimizer=optimizer, progress=progress)
    return defense.eval()


def main(quick: bool = False) -> None:
    """Trains both and prints their accuracy, attacked, with intervals and the paired difference."""
    eps, budget = 0.2, 8 if quick else 320
    inner = partial(pd.attacks.pgd, eps=eps, num_steps=2 if quick else 7)
    objectives = {"bayes": elbo, "adv_bnn": adversarial(elbo, inner)}
    attacks = {
        f"pgd_{draws}": pd.with_draws(partial(pd.attacks.pgd, num_steps=budget // draws), draws)
        for draws in (1, 4)
    }
    data = pd.data.digits().test[: 40 if quick else 360]
    reports = {
        name: pd.evaluate(
            trained(objective, epochs=2 if quick else 30, progress=not quick),
            data,
            attacks,
            eps=eps,
            rules=[pd.rules.mean_prob],
            num_samples=10 if quick else 50,
            name=name,
        )
        for name, objective in objectives.items()
    }
    for report in reports.values():
        print(report.table(("defense", "attack", "accuracy", "low", "high", "gradients")))
    comparison = pd.compare(reports["adv_bnn"], reports["bayes"])
    print(comparison.table(("a", "b", "attack", "difference", "low", "high")))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
