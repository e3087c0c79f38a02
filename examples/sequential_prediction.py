"""How many draws does a random network need for a label that can be trusted?

    python examples/sequential_prediction.py [--quick]

Every image draws until its label is settled: it then differs from the label of infinitely many draws with
probability at most 5 %. Images that 50 draws do not settle are left open, which attacked ones are more often.
"""

import argparse

import torch
from torch.utils.data import DataLoader

import probdefense as pd
from probdefense.tables import format_table


def main(quick: bool = False) -> None:
    torch.manual_seed(0)
    train, test = pd.data.digits()
    epochs, count, many = (3, 50, 100) if quick else (20, 360, 2000)
    x, y = (part[:count] for part in test.tensors)
    defenses = {
        "rse": pd.defenses.rse(pd.models.small_cnn()),
        "bayesian": pd.defenses.bayesian(pd.models.small_cnn(), num_data=len(train)),
    }
    rows = []
    for name, defense in defenses.items():
        optimizer = torch.optim.Adam(defense.param_groups(), lr=4e-3)
        pd.fit(defense, DataLoader(train, 64, shuffle=True), epochs=epochs, optimizer=optimizer)
        defense.eval()
        attacked = pd.attacks.pgd(defense.samples(4), x, y, eps=0.1, num_steps=5, seed=0)
        for kind, points in {"clean": x, "attacked": attacked}.items():
            settled = pd.predict(defense, points, 50, alpha=0.05, seed=0)
            label = pd.predict(defense, points, many, seed=1).label
            wrong = settled.settled & (settled.label != label)
            rows.append(
                {
                    "defense": name,
                    "images": kind,
                    "draws": float(torch.as_tensor(settled.num_samples).double().mean()),
                    "left open": float((~settled.settled).double().mean()),
                    f"settled against {many} draws": float(wrong.double().mean()),
                }
            )
    columns = tuple(rows[0])
    print(format_table(rows, columns, percent=columns[3:]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less training, fewer images and draws")
    main(**vars(parser.parse_args()))
