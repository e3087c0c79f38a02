"""May a defense abstain, and do its probabilities mean what they say, clean and attacked?

    python examples/selective_and_calibrated.py [--quick]

A threshold on the predictive entropy keeps 90 % of the clean images. An attacker wants answers that are
wrong: the share of them, not the accuracy of what is answered, is what abstention has to bring down.
"""

import argparse
from functools import partial

import torch
from torch.utils.data import DataLoader

import probdefense as pd
from probdefense.tables import format_table

COLUMNS = ("defense", "attack", "eps", "nll", "brier", "ece", "answered", "selective_accuracy", "errors")


def main(quick: bool = False) -> None:
    torch.manual_seed(0)
    train, test = pd.data.digits()
    epochs, count, steps = (3, 60, 5) if quick else (20, 360, 20)
    x, y = (part[:count] for part in test.tensors)
    defenses = {
        "plain": pd.deterministic(pd.models.small_cnn()),
        "rse": pd.defenses.rse(pd.models.small_cnn()),
        "bayesian": pd.defenses.bayesian(pd.models.small_cnn(), num_data=len(train)),
    }
    rows = []
    for name, defense in defenses.items():
        optimizer = torch.optim.Adam(defense.param_groups(), lr=4e-3)
        pd.fit(defense, DataLoader(train, 64, shuffle=True), epochs=epochs, optimizer=optimizer)
        attack = pd.with_draws(partial(pd.attacks.pgd, num_steps=steps), 4)
        report = pd.evaluate(
            defense.eval(), (x, y), {"pgd": attack}, eps=[0.05, 0.1], num_samples=30, name=name
        )
        rows += pd.detection.uncertainty(report, keep=0.9)
    print(format_table(rows, COLUMNS, percent=COLUMNS[5:]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less training, fewer images and steps")
    main(**vars(parser.parse_args()))
