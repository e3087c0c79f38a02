"""What one kind of randomness costs: each builder beside the plain network, as ratios of one run.

    python benchmarks/layers.py [turns]

The layers of each variant are the whole difference to the plain network. Read ratios only.
"""

import sys
from collections.abc import Callable

import pyro.distributions as dist
import torch
from speed import cnn, medians, plain_step, show, svi_step
from torch import nn

import probdefense as pd
from probdefense.defenses import bayesian, brelu, ensemble, jump_relu, mc_dropout, pni, rse

NUM_DATA = 60_000


def variants(net: nn.Module) -> dict[str, pd.Defense]:
    """One defense per kind of layer."""
    return {
        "noise before every convolution": rse(net),
        "multiplicative noise, learned": rse(net, multiplicative=True, scale="learned"),
        "JumpReLU": jump_relu(net, kappa=0.1),
        "JumpReLU, random": jump_relu(net, kappa=dist.Uniform(0.06, 0.1)),
        "JumpReLU, learned": jump_relu(net, kappa=dist.Normal(0.1, 0.05), learned=True),
        "bounded ReLU": brelu(net),
        "dropout masks": mc_dropout(net, rate=0.2),
        "parametric noise on weights": pni(net),
        "parametric noise on inputs": pni(net, place="input"),
        "random weights, one flat site": bayesian(net, num_data=NUM_DATA),
        "ensemble of one draw": ensemble([net, net]),
    }


def compare(title: str, net: nn.Module, x: torch.Tensor, turns: int) -> None:
    """A draw, a draw with its input gradient, and a training step, for every variant."""
    y = torch.arange(len(x)) % 10
    defenses = {"plain network": pd.deterministic(net), **variants(net)}

    def draw(defense: pd.Defense) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return defense(x)

        return run

    def gradient(defense: pd.Defense) -> Callable[[], object]:
        def run() -> object:
            point = x.clone().requires_grad_(True)
            return torch.autograd.grad(defense(point).sum(), point)

        return run

    for work, make in {"one draw": draw, "one draw and its input gradient": gradient}.items():
        seconds = medians({name: make(defense) for name, defense in defenses.items()}, turns)
        show(f"{title}: {work}", seconds, unit="plain network")
    steps: dict[str, Callable[[], object]] = {"plain network": plain_step(net, x, y)}
    steps |= {name: svi_step(defense, x, y) for name, defense in variants(net).items()}
    show(f"{title}: a training step", medians(steps, turns), unit="plain network")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    compare("CNN of 100,000 parameters, 28x28, batch 64", cnn(), torch.rand(64, 1, 28, 28), turns)
    compare("ResNet-20, 32x32, batch 16", pd.models.resnet20().eval(), torch.rand(16, 3, 32, 32), turns)


if __name__ == "__main__":
    main()
