"""What did training learn about the noise, and do independent fits agree?

Two fits of one defense become two chains of an ArviZ container: R-hat of the log-likelihood says
whether they found the same function, leave-one-out which images they rely on.

    python examples/posterior_in_arviz.py --quick --out posterior
"""

import argparse
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import torch
from torch.utils.data import DataLoader

import probdefense as pd


def fitted(seed: int, epochs: int) -> pd.Defense:
    """Weights and noise scales with a posterior each, from one seed."""
    train = pd.data.digits().train
    torch.manual_seed(seed)
    noisy = pd.defenses.rse(pd.models.small_cnn(), scale="learned")
    defense = pd.defenses.bayesian(noisy, num_data=len(train))
    pd.fit(defense, DataLoader(train, batch_size=64, shuffle=True), epochs=epochs, progress=False)
    return defense.eval()


def main(quick: bool = False, out: str | None = None) -> Any:
    """Fits twice, prints what ArviZ says, and with `out` writes the container and a picture."""
    x, y = pd.data.digits().train.tensors
    fits = [fitted(seed, epochs=2 if quick else 30) for seed in (0, 1)]
    tree = pd.to_arviz(fits, (x[:100], y[:100]), num_samples=100)
    print(arviz.summary(tree, var_names=["noise_rms", "weight_rms"], kind="stats"))
    print(tree["constant_data"]["noise_scale"].to_series())

    r_hat = arviz.rhat(tree["log_likelihood"]["y"])
    worst = float(np.max(np.asarray(r_hat["y"] if hasattr(r_hat, "data_vars") else r_hat)))
    print(f"R-hat of the log-likelihood, worst image: {worst:.2f}")
    found = pd.analysis.loo(tree)
    print(f"leave-one-out {found.elpd:.1f} nats (standard error {found.se:.1f})")
    print(f"{int((found.k_hat > 0.7).sum())} images with k-hat above 0.7, {found.num_dropped} dropped")
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        tree.to_netcdf(str(folder / "posterior.nc"))
        pd.analysis.noise_scales(tree).figure.savefig(folder / "noise_scales.png", dpi=150)
    return tree


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    parser.add_argument("--out", help="folder for the container and the picture")
    given = parser.parse_args()
    main(given.quick, given.out)
