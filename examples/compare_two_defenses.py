"""Is one defense more robust than another, or were these two networks lucky?

    python examples/compare_two_defenses.py [--quick]

One report per training seed and defense, all on the same images and verdict draws. With one seed the answer
is about two networks; with several it is about two methods, and less sure, because training is a sample too.
"""

import argparse
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader

import probdefense as pd
from probdefense.objectives import adversarial, elbo

EPS = 0.15


def report(name: str, training_seed: int, epochs: int, count: int) -> pd.Report:
    """Trains one network and attacks it; attacks and verdicts have one seed throughout."""
    torch.manual_seed(training_seed)
    train, test = pd.data.digits()
    net: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    defense = {
        "plain": lambda: pd.deterministic(net),
        "bayesian": lambda: pd.defenses.bayesian(net, num_data=len(train)),
    }[name]()
    objective = adversarial(elbo, partial(pd.attacks.pgd, eps=EPS, num_steps=3, step_size=0.07))
    optimizer = torch.optim.Adam(defense.param_groups(), lr=4e-3)
    loader = DataLoader(train, 128, shuffle=True)
    pd.fit(defense, loader, epochs=epochs, objective=objective, optimizer=optimizer)
    attack = pd.with_draws(partial(pd.attacks.pgd, num_steps=10), 4)
    x, y = (part[:count] for part in test.tensors)
    return pd.evaluate(
        defense.eval(), (x, y), {"pgd": attack}, eps=EPS, rules=[pd.rules.mean_prob], name=name
    )


def main(quick: bool = False) -> None:
    seeds, epochs, count = (2, 2, 60) if quick else (5, 30, 360)
    plain, bayesian = (
        [report(name, seed, epochs, count) for seed in range(seeds)] for name in ("plain", "bayesian")
    )
    print(pd.compare(bayesian[0], plain[0]).table(), end="\n\n")
    print(pd.compare(bayesian, plain).table())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less training, fewer seeds and images")
    main(**vars(parser.parse_args()))
