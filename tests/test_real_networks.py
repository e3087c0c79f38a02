"""Trained networks of other people, retrofitted; skipped where PROBDEFENSE_DATA does not hold them."""

import gzip
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.attacks.bpda import bpda
from probdefense.defenses import jump_relu, quantiles, surrogates, tune_kappa


def stored(*path):
    """A file of real data or trained weights, or a skip."""
    file = Path(os.environ.get("PROBDEFENSE_DATA", "."), *path)
    if not file.exists():
        pytest.skip(f"needs {file.name} in PROBDEFENSE_DATA")
    return file


def cifar_resnet20():
    weights = torch.load(
        stored("weights", "akamaster_resnet_cifar10", "resnet20-12fca82f.th"),
        map_location="cpu",
        weights_only=True,
    )["state_dict"]
    net = pd.models.resnet20()
    net.load_state_dict({name.removeprefix("module."): value for name, value in weights.items()})
    normalize = pd.nn.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    images = np.load(stored("cifar10", "cifar10-lossless-test300.npz"))
    x = torch.as_tensor(images["x"]).permute(0, 3, 1, 2).float() / 255
    return nn.Sequential(normalize, net).eval(), x, torch.as_tensor(images["y"]).long()


def mnist_cnn():
    """The adversarially trained network of the shared weights, and the first test images."""
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10)),
    )
    file = stored("weights", "alpha_beta_crown", "sdp", "mnist_cnn_a_adv.model")
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    pixels, labels = (
        np.frombuffer(gzip.decompress(stored("MNIST", "raw", f"t10k-{part}-ubyte.gz").read_bytes()), np.uint8)
        for part in ("images-idx3", "labels-idx1")
    )
    x = torch.tensor(pixels[16:].reshape(-1, 1, 28, 28)[:500]).float() / 255
    return net.eval(), x, torch.tensor(labels[8:508]).long()


def cifar_cnn():
    """The adversarially trained network of the shared weights, and the images of `cifar_resnet20`."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(2048, 100), nn.ReLU(), nn.Linear(100, 10)),
    )
    pd.models.load_weights(net, stored("weights", "alpha_beta_crown", "sdp", "cifar_cnn_a_adv.model"))
    normalize = pd.nn.Normalize([0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616])
    return nn.Sequential(normalize, net).eval(), *cifar_resnet20()[1:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("real", "eps", "count", "gradients"),
    [(mnist_cnn, 0.3, 100, 32), (cifar_cnn, 4 / 255, 100, 32), (cifar_resnet20, 1 / 255, 25, 16)],
)
def test_checks_are_quiet_on_networks_that_nobody_here_trained(real, eps, count, gradients):
    net, x, y = real()
    found = pd.checks.run(pd.deterministic(net), x[:count], y[:count], eps=eps, num_gradients=gradients)
    assert 0.05 < found["larger eps"].evidence["accuracy"] < 0.95
    assert found.fired == [], found.table()


@pytest.mark.parametrize(("real", "known"), [(cifar_resnet20, 0.917), (mnist_cnn, 0.963)])
def test_real_networks_pay_for_the_jump_with_clean_accuracy(real, known):
    """Networks that nobody here trained: accuracy is as published, and falls where kappa grows."""
    net, x, y = real()
    half = len(x) // 2

    def accuracy(kappa, rows=slice(None)):
        with torch.no_grad():
            return float((jump_relu(net, kappa=kappa)(x[rows])[0].argmax(1) == y[rows]).float().mean())

    plain = accuracy(0.0)
    with torch.no_grad():
        assert plain == float((net(x).argmax(1) == y).float().mean())
    assert plain == pytest.approx(known, abs=0.03)
    grid = [quantiles(net, x[:32], share) for share in (0.0, 0.1, 0.2, 0.4, 0.8)]
    kappa = tune_kappa(net, (x[:half], y[:half]), max_drop=0.03, candidates=grid)
    assert max(kappa.values()) > 0, "some of the activations can be spared"
    assert accuracy(kappa, slice(half, None)) > plain - 0.08
    assert accuracy(grid[-1]) < plain - 0.2, "most of them cannot"


def test_the_robustness_that_a_jump_adds_to_a_real_network_is_hidden_gradient():
    """At l-inf 0.3, kappa 0.2: its own gradient finds little, the smoothed jump undoes more than it gave."""
    net, x, y = mnist_cnn()
    x, y = x[:150], y[:150]
    attack = partial(pd.attacks.pgd, eps=0.3, num_steps=20, seed=0)

    def accuracy(points):
        with torch.no_grad():
            return float((defense(points)[0].argmax(1) == y).float().mean())

    plain, defense = pd.deterministic(net), jump_relu(net, kappa=0.2)
    own = accuracy(attack(defense, x, y))
    with bpda(defense, surrogates(defense)):
        adaptive = accuracy(attack(defense, x, y))
    transferred = attack(plain, x, y)
    assert adaptive < own - 0.05 and adaptive < accuracy(transferred) - 0.03
