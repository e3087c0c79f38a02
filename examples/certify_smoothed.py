"""How far can an image move before the vote of a noisy network may change?

    python examples/certify_smoothed.py [--quick]

Noise on the raw pixels gives a certificate: no L2 perturbation within the radius changes the winner of
infinitely many votes. An attack bounds the same accuracy from above. The noise before the inner layers and
the random weights of the second defense are inside the vote, and need no proof of their own.
"""

import argparse
from functools import partial

import torch
from torch.utils.data import DataLoader

import probdefense as pd
from probdefense.tables import format_table

RADII = [0.0, 0.25, 0.5, 1.0]


def trained(defense: pd.Defense, train: torch.utils.data.Dataset, epochs: int) -> pd.Defense:
    """A defense trained on digits."""
    optimizer = torch.optim.Adam(defense.param_groups(), lr=4e-3)
    pd.fit(defense, DataLoader(train, 64, shuffle=True), epochs=epochs, optimizer=optimizer)
    return defense.eval()


def main(quick: bool = False) -> None:
    torch.manual_seed(0)
    train, test = pd.data.digits()
    epochs, count, n = (3, 30, 150) if quick else (20, 360, 10_000)
    x, y = (part[:count] for part in test.tensors)
    noisy = partial(pd.defenses.rse, sigma_init=0.35)
    defenses = {
        "noise": noisy(pd.models.small_cnn()),
        "noise and random weights": pd.defenses.bayesian(noisy(pd.models.small_cnn()), num_data=len(train)),
    }
    rows = []
    for name, defense in defenses.items():
        trained(defense, train, epochs)
        certificate = pd.certify(defense, x, n=n, seed=0)
        attack = pd.with_draws(partial(pd.attacks.pgd, num_steps=10), 4)
        report = pd.evaluate(
            defense, (x, y), {"pgd": attack}, norm=2, eps=RADII[1:], rules=[pd.rules.vote], num_samples=50
        )
        for certified, attacked in zip(certificate.curve(y, RADII), report.curve("pgd", "vote"), strict=True):
            row = {"defense": name, "l2 radius": certified["eps"], "certified": certified["accuracy"]}
            rows.append({**row, "low": certified["low"], "under attack": attacked["accuracy"]})
        print(f"{name}: abstains on {int((certificate.label < 0).sum())} of {count} images")
    columns = ("defense", "l2 radius", "certified", "low", "under attack")
    print(format_table(rows, columns, percent=columns[2:]))
    print(f"Each certificate is false with probability at most {certificate.alpha:g}, and about infinitely")
    print("many votes: the verdict of 50 draws may differ where the vote is close.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less training, images and votes")
    main(**vars(parser.parse_args()))
