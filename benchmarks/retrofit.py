"""What noise costs a trained ResNet-20, and what recalibration and fine-tuning give back.

The table of ``docs/howto/retrofit.md``. Needs the trained network and the lossless images of CIFAR-10 in
PROBDEFENSE_DATA (``weights/akamaster_resnet_cifar10``, ``cifar10``); minutes on one core.

    python benchmarks/retrofit.py [--epochs 2]
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

import probdefense as pd

ROOT = Path(os.environ.get("PROBDEFENSE_DATA", ""))
WEIGHTS = "weights/akamaster_resnet_cifar10/resnet20-12fca82f.th"
SCALES = (0.02, 0.05, 0.1)


def images(part: str) -> TensorDataset:
    """Lossless images of CIFAR-10."""
    found = np.load(ROOT / f"cifar10/cifar10-lossless-{part}.npz")
    x = torch.as_tensor(found["x"]).permute(0, 3, 1, 2).float() / 255
    return TensorDataset(x.contiguous(), torch.as_tensor(found["y"]).long())


def accuracy(defense: pd.Defense, data: TensorDataset) -> str:
    """In percent, of the mean of 10 draws."""
    label = pd.predict(defense.eval(), data, 10, seed=0).label
    return f"{100 * float((label == data.tensors[1]).float().mean()):.1f}"


def main() -> None:
    """Prints one line per scale, and one per epoch of fine-tuning at the largest."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    train, test = images("train4000"), images("test300")
    net = pd.models.load_weights(pd.models.resnet(20), ROOT / WEIGHTS)
    net = torch.nn.Sequential(pd.nn.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), net)
    few = DataLoader(torch.utils.data.Subset(train, range(1000)), 100)
    print("no noise", accuracy(pd.deterministic(net), test), flush=True)
    for scale in SCALES:
        defense = pd.defenses.rse(net, sigma_init=scale, sigma_inner=scale / 2).eval()
        line = [accuracy(defense, test)]
        pd.recalibrate(defense, few)
        print("scale", scale, "as it is", *line, "recalibrated", accuracy(defense, test), flush=True)
    loader = DataLoader(pd.data.augmented(train, crop=4), 128, shuffle=True)
    for epoch in range(epochs):
        optimizer = torch.optim.Adam(defense.param_groups(), lr=1e-3 / 3**epoch)
        history = pd.fit(defense, loader, epochs=1, optimizer=optimizer, seed=epoch, progress=False)
        told = f"{100 * history.accuracy[-1]:.1f} in training, {history.seconds[-1]:.0f} s"
        print("fine-tuned", epoch + 1, accuracy(defense, test), told, flush=True)
    pd.save(defense, "resnet20-rse.safetensors", data="CIFAR-10")


if __name__ == "__main__":
    main()
