"""Does uncertainty give attacks away, also those that know the detector?

    python examples/detect_attacks.py [--quick]

A detector by predictive entropy sees points near the boundary. An attack whose loss also lowers the entropy
goes on past it: the area under the detector's curve falls below one half, where it prefers attacked images.
Noise is no data: images of pure noise show whether the detector knows what it has never seen.
"""

import argparse
from functools import partial

import torch
from torch.utils.data import DataLoader

import probdefense as pd
from probdefense.tables import format_table

COLUMNS = (
    "defense",
    "attack",
    "predictive_entropy",
    "auroc",
    "auroc_low",
    "auroc_high",
    "answered",
    "errors",
)


def main(quick: bool = False) -> None:
    torch.manual_seed(0)
    train, test = pd.data.digits()
    epochs, count, steps = (3, 60, 5) if quick else (20, 360, 40)
    x, y = (part[:count] for part in test.tensors)
    defenses = {
        "rse": pd.defenses.rse(pd.models.small_cnn()),
        "bayesian": pd.defenses.bayesian(pd.models.small_cnn(), num_data=len(train)),
    }
    blind = pd.losses.predictive_cross_entropy
    evading = partial(pd.detection.evading, pd.detection.predictive_entropy, loss=blind)
    losses = {"blind": blind} | {f"knows the detector, weight {w}": evading(weight=w) for w in (0.1, 0.3)}
    rows = []
    for name, defense in defenses.items():
        optimizer = torch.optim.Adam(defense.param_groups(), lr=4e-3)
        pd.fit(defense, DataLoader(train, 64, shuffle=True), epochs=epochs, optimizer=optimizer)
        attacks = {
            title: pd.with_draws(partial(pd.attacks.pgd, num_steps=steps, loss=loss), 4)
            for title, loss in losses.items()
        }
        report = pd.evaluate(defense.eval(), (x, y), attacks, eps=0.1, num_samples=30, name=name)
        rows += pd.detection.uncertainty(report, keep=0.9)
        familiar, strange = (
            pd.predict(defense, images, 30, seed=0).predictive_entropy for images in (x, torch.rand_like(x))
        )
        area = pd.detection.auroc(familiar, strange)
        row = {"defense": name, "attack": "pure noise", "predictive_entropy": float(strange.mean())}
        rows.append({**row, "auroc": area.value, "auroc_low": area.low, "auroc_high": area.high})
    print(format_table(rows, COLUMNS, percent=COLUMNS[3:]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less training, fewer images and steps")
    main(**vars(parser.parse_args()))
