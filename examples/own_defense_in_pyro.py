"""How is a defense that is written in plain Pyro trained and attacked?

    python examples/own_defense_in_pyro.py [--quick]

Every image gets a random contrast, and the last layer is Bayesian: no builder knows that. A pair of Pyro
modules is a defense if the model returns logits and observes y in a plate of the size of the data set.
"""

import sys
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal, init_to_sample
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.utils.data import DataLoader

import probdefense as pd


class Model(PyroModule):
    """A random contrast per image, and a Bayesian last layer."""

    def __init__(self, num_data: int):
        super().__init__()
        self.num_data = num_data
        self.features = nn.Sequential(*list(pd.models.small_cnn())[:-1])
        random_linear: Any = PyroModule[nn.Linear]
        self.last = random_linear(64, 10)
        self.last.weight = PyroSample(dist.Normal(0.0, 0.3).expand([10, 64]).to_event(2))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Logits ``(batch, classes)``; observes y."""
        with pyro.plate("data", size=self.num_data, subsample=x):
            contrast = pyro.sample("contrast", dist.LogNormal(0.0, 0.3))
        shaded = 0.5 + (x - 0.5) * contrast.view(-1, 1, 1, 1)
        logits: Tensor = self.last(self.features(shaded))
        with pyro.plate("labels", size=self.num_data, subsample=x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits


def main(quick: bool = False) -> None:
    """Trains it like any other defense and attacks it with one draw per step and with several."""
    torch.manual_seed(0)
    train, test = pd.data.digits()
    model = Model(len(train))
    hidden = poutine.block(model, hide=["y", "contrast"])
    guide = AutoNormal(hidden, init_loc_fn=init_to_sample, init_scale=0.05)
    defense = pd.Defense(model, guide, example=train.tensors[0][:2])
    optimizer = torch.optim.Adam(defense.param_groups(), lr=4e-3)
    loader = DataLoader(train, 64, shuffle=True)
    pd.fit(defense, loader, epochs=3 if quick else 20, optimizer=optimizer, progress=not quick)

    budget = 8 if quick else 160
    attacks = {
        f"pgd_{draws}": pd.with_draws(partial(pd.attacks.pgd, num_steps=budget // draws), draws)
        for draws in (1, 4)
    }
    data = test[: 30 if quick else 360]
    report = pd.evaluate(defense.eval(), data, attacks, eps=0.1, num_samples=10 if quick else 50)
    print(report.table(("attack", "rule", "accuracy", "low", "high", "gradients")))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
