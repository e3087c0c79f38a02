"""Worlds in which the right answer is known."""

import importlib
import math
import re
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

import probdefense as pd

OPERATORS = torch.library.Library("torchvision", "FRAGMENT")

FAILURE_RATE = 2e-5
"""Every statistical test may fail by chance this often."""


@dataclass
class LinearWorld:
    r"""Two classes split by a plane, with Gaussian noise on the input: everything is closed.

    The net gives logits ``(0, w.x + b)``, steepened by `slope`. The share of draws that choose class
    1 is $\Phi((w \cdot x + b) / (\sigma \|w\|))$; the gradient of the expected margin is `w`; the
    smallest L2 perturbation is $|w \cdot x + b| / \|w\|$, which is also the certified radius.
    """

    sigma: float = 0.25
    dims: int = 6
    slope: float = 1.0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.w = torch.randn(self.dims, generator=generator)
        self.b = 0.1 - 0.5 * self.w.sum()
        self.net = nn.Linear(self.dims, 2)
        with torch.no_grad():
            self.net.weight.copy_(torch.stack([torch.zeros_like(self.w), self.slope * self.w]))
            self.net.bias.copy_(self.slope * torch.stack([torch.zeros(()), self.b]))

    def points(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Points well inside the box and their labels."""
        x = 0.35 + 0.3 * torch.rand(count, self.dims, generator=torch.Generator().manual_seed(seed))
        return x, (self.score(x) > 0).long()

    def score(self, x: Tensor) -> Tensor:
        return x @ self.w + self.b

    def share_of_one(self, x: Tensor) -> Tensor:
        return torch.distributions.Normal(0, 1).cdf(self.score(x) / (self.sigma * self.w.norm()))

    def distance(self, x: Tensor) -> Tensor:
        return self.score(x).abs() / self.w.norm()

    def plain(self) -> pd.Defense:
        return pd.deterministic(self.net)

    def noisy(self) -> pd.Defense:
        return pd.defenses.rse(self.net, sigma_init=self.sigma, before_linear=True)


def tiny_net() -> nn.Sequential:
    """Two convolutions with normalization inside, batch normalization and a linear layer."""
    return nn.Sequential(
        pd.nn.Normalize([0.3], [0.5]),
        nn.Conv2d(1, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def tiny_batch(count: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 6, 6, generator=generator)
    return x, torch.randint(3, (count,), generator=generator)


def normal_quantile(failure_rate: float = FAILURE_RATE) -> float:
    """How many standard errors a two-sided test at the common failure rate allows."""
    return float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - failure_rate / 2)))


def monte_carlo_tolerance(standard_deviation: float, count: int) -> float:
    return normal_quantile() * standard_deviation / math.sqrt(count)


def import_torchvision() -> ModuleType:
    """torchvision; where its build misses operators of the installed torch, they are named but not there."""
    for _ in range(10):
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            assert missing, error
            OPERATORS.define(f"{missing[1]}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    raise AssertionError("torchvision still does not import")
