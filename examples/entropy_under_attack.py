"""Does a Bayesian network know that it is under attack?

The predictive entropy of attacked images against that of clean ones: how far they are apart, and how
often an attacked image is the more uncertain of two (the AUROC). The second attack was told of it, and
climbs the loss while it pays for entropy.

    python examples/entropy_under_attack.py --quick --out entropy
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from scipy.stats import mannwhitneyu
from torch import Tensor
from torch.utils.data import DataLoader

import probdefense as pd


def confident_error(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the predictive minus its entropy: wrong, and sure of it."""
    log_probs = pd.rules.mean_prob(logits)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return -log_probs.gather(1, y.unsqueeze(1)).squeeze(1) - 2 * entropy


def main(quick: bool = False, out: str | None = None) -> dict[str, pd.Prediction]:
    """Trains, attacks, and prints uncertainties."""
    torch.manual_seed(0)
    train, test = pd.data.digits()
    defense = pd.defenses.bayesian(pd.models.small_cnn(), num_data=len(train))
    loader = DataLoader(train, batch_size=64, shuffle=True)
    pd.fit(defense, loader, epochs=4 if quick else 30, progress=False)
    defense.eval()

    x, y = (part[: 100 if quick else 360] for part in test.tensors)
    pgd = partial(pd.attacks.pgd, defense.samples(8), x, y, eps=0.1, num_steps=8 if quick else 40, seed=0)
    points = {"clean": x, "pgd": pgd(), "pgd, confident": pgd(loss=confident_error)}
    seen = {name: pd.predict(defense, x_adv, 50, seed=0) for name, x_adv in points.items()}

    print("inputs           accuracy  entropy  mutual information  AUROC of the entropy")
    calm = seen["clean"].predictive_entropy
    for name, found in seen.items():
        entropy = found.predictive_entropy
        auroc = mannwhitneyu(entropy, calm).statistic / (len(entropy) * len(calm))
        right = 100 * (found.label == y).double().mean()
        middle = found.mutual_information.median()
        print(f"{name:16} {right:7.1f} % {entropy.median():8.2f} {middle:19.3f} {auroc:21.2f}")
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        axes = pd.analysis.entropy_clean_attacked(seen["clean"], seen["pgd"])
        axes.figure.savefig(Path(out) / "entropy.png", dpi=150)
    return seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer images, epochs and steps")
    parser.add_argument("--out", help="folder for the picture")
    given = parser.parse_args()
    main(given.quick, given.out)
