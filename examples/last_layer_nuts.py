"""Does variational inference find the last layer that NUTS finds?

A network is trained with a Gaussian over its last layer; NUTS then samples that layer's exact posterior
given the same features. Agreement, distance and robustness say what the Gaussian cost.

    python examples/last_layer_nuts.py --quick
"""

import argparse
from functools import partial

import torch
from torch.utils.data import DataLoader, TensorDataset

import probdefense as pd


def main(quick: bool = False) -> pd.numpyro.Gap:
    """Trains, samples, compares, and prints a table."""
    torch.manual_seed(0)
    train, test = pd.data.digits()
    x, y = (part[: 300 if quick else 1437] for part in train.tensors)
    defense = pd.defenses.bayesian(
        pd.models.small_cnn(), num_data=len(x), where=lambda name, _: name.startswith("8.")
    )
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    pd.fit(defense, loader, epochs=16 if quick else 30, progress=False)

    draws = 120 if quick else 300
    gold = pd.numpyro.last_layer_nuts(defense.eval(), (x, y), num_samples=draws, num_warmup=draws)

    x, y = (part[: 60 if quick else 360] for part in test.tensors)
    pgd = partial(pd.attacks.pgd, num_steps=4 if quick else 40)
    gap = pd.numpyro.compare_to_gold(defense, gold, (x, y), {"pgd": pgd}, eps=0.1, num_samples=50)
    print(gap.report.table(("defense", "attack", "eps", "rule", "accuracy", "low", "high")))
    print(f"same label on {100 * gap.agreement:.1f} % of images")
    print(f"total variation between the predictives {gap.total_variation:.3f}")
    print(f"mean entropy {gap.entropy:.3f} nats, of NUTS {gap.gold_entropy:.3f}")
    return gap


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer images, epochs and draws")
    main(parser.parse_args().quick)
