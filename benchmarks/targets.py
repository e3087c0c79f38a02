"""Which wrong classes should a targeted attack climb toward? The likely ones, or the nearest (MALT)?

    PROBDEFENSE_DATA=... python benchmarks/targets.py [gradients]

Auto-PGD on DLR toward `TARGETS` classes, as in the suite, from the same starts and at equal gradients: what
the order of classes costs (a gradient for each of twice as many classes) is taken from the steps. Differences
are paired by image: accuracy left by the likeliest classes minus that left by those with the smallest gap of
logits over its slope, in points with the 95 % interval; above zero the latter are the stronger attack.
"""

import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import probdefense as pd
from probdefense.attacks import apgd
from probdefense.attacks.apgd import _easy_targets, _likely_wrong
from probdefense.logits.losses import dlr
from probdefense.types import Inputs, Labels, LogitsFn

TARGETS = 2


class Case(NamedTuple):
    """A network, images that it is right about, and a radius at which some of them fall."""

    net: nn.Module
    x: Inputs
    y: Labels
    eps: float


def stack(*widths: int, kernel: int, padding: int, size: int, channels: int = 3) -> list[nn.Module]:
    """Convolutions of stride 2 and a hidden layer of 100, as in the published networks."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(channels, width, kernel, 2, padding), nn.ReLU()]
        channels = width
    return [*layers, nn.Flatten(), nn.Linear(size, 100), nn.ReLU(), nn.Linear(100, 10)]


def weights(*path: str) -> Path:
    """A file of trained weights under PROBDEFENSE_DATA."""
    return Path(os.environ["PROBDEFENSE_DATA"], "weights", *path)


def cifar(net: nn.Module, mean: list[float], std: list[float], eps: float, count: int) -> Case:
    """A network behind its normalization, and the first lossless test images."""
    images = np.load(Path(os.environ["PROBDEFENSE_DATA"], "cifar10", "cifar10-lossless-test300.npz"))
    x = torch.as_tensor(images["x"]).permute(0, 3, 1, 2).float()[:count] / 255
    return Case(
        nn.Sequential(pd.nn.Normalize(mean, std), net).eval(),
        x,
        torch.as_tensor(images["y"])[:count].long(),
        eps,
    )


def cifar_resnet20() -> Case:
    """Trained without attacks (Idelbayev's ResNet-20)."""
    net = pd.models.resnet20()
    pd.models.load_weights(net, weights("akamaster_resnet_cifar10", "resnet20-12fca82f.th"))
    return cifar(net, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 1 / 255, 60)


def cifar_cnn() -> Case:
    """Trained under attack, of the verification benchmarks."""
    net = nn.Sequential(*stack(16, 32, kernel=4, padding=1, size=2048))
    pd.models.load_weights(net, weights("alpha_beta_crown", "sdp", "cifar_cnn_a_adv.model"))
    return cifar(net, [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616], 4 / 255, 300)


def mnist_cnn() -> Case:
    """Trained under attack, of the verification benchmarks."""
    net = nn.Sequential(*stack(16, 32, kernel=4, padding=1, size=1568, channels=1))
    pd.models.load_weights(net, weights("alpha_beta_crown", "sdp", "mnist_cnn_a_adv.model"))
    x, y = (part[:1000] for part in pd.data.load("mnist", Path(os.environ["PROBDEFENSE_DATA"])).test.tensors)
    return Case(net.eval(), x, y, 0.3)


def digits() -> Case:
    """Trained here under PGD, in seconds."""
    torch.manual_seed(0)
    train, test = pd.data.digits()
    net = pd.models.small_cnn(width=8)
    defense = pd.deterministic(net)
    objective = pd.objectives.adversarial(pd.objectives.elbo, partial(pd.attacks.pgd, eps=0.2, num_steps=4))
    loader = torch.utils.data.DataLoader(train, batch_size=64, shuffle=True)
    optimizer = torch.optim.Adam(defense.param_groups(), lr=8e-3)
    pd.fit(defense, loader, epochs=15, objective=objective, optimizer=optimizer, progress=False)
    x, y = test.tensors
    return Case(net.eval(), x, y, 0.2)


def left(function: LogitsFn, case: Case, aims: Tensor, num_steps: int) -> np.ndarray:
    """Whether an image stands against climbs toward each of the classes, ``(targets, batch)``."""
    stands = torch.ones(len(case.y), dtype=torch.bool)
    for target in aims:
        points = apgd(
            function, case.x, case.y, eps=case.eps, loss=dlr, target=target, num_steps=num_steps, seed=0
        )
        for answer in (case.x, points):
            with torch.no_grad():
                stands &= function(answer)[0].argmax(1) == case.y
    return stands.double().numpy()


def main(gradients: int = 120) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"l-inf, {TARGETS} targets, {gradients} gradients")
    for make in (digits, mnist_cnn, cifar_cnn, cifar_resnet20):
        case = make()
        function = pd.deterministic(case.net)
        likely = _likely_wrong(function, case.x, case.y, TARGETS).T
        near = torch.stack(list(_easy_targets(function, case.x, case.y, TARGETS, math.inf)))
        other = float((likely.sort(0).values != near.sort(0).values).any(0).double().mean())
        plain = left(function, case, likely, gradients // TARGETS)
        malt = left(function, case, near, (gradients - 2 * TARGETS) // TARGETS)
        gain, changed = 100 * (plain - malt), f"another set of classes for {100 * other:.0f} %"
        half = 1.96 * gain.std(ddof=1) / math.sqrt(len(gain))
        print(f"{make.__name__}, eps {case.eps:.4f}, {len(gain)} images, {changed}:", flush=True)
        print(f"  the likeliest leave {100 * plain.mean():.1f} %, gain {gain.mean():+.1f} +- {half:.1f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
