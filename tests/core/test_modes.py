"""Attack, prediction and verdict see the network in evaluation mode with only what is declared random alive."""

import copy
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import nn

import probdefense as pd
from tests.nn.test_passes import LAYERS, Depth, Encoder, Functional, Jitter, Recurrent, hidden_net
from tests.worlds import import_torchvision

PGD = {"pgd": partial(pd.attacks.pgd, num_steps=3)}


def data(count=30):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, 4, generator=generator)
    return x, torch.randint(3, (count,), generator=generator)


def same_in_both_modes(defense, number):
    """A number of a defense in training mode, which must be what it is in evaluation mode."""
    other = copy.deepcopy(defense).eval()
    first = number(defense.train())
    assert all(module.training for module in defense.modules()), "modes are put back"
    return first, number(other)


def looks(x):
    """Every way in which a defense is looked at without being trained."""
    draws = {"call": lambda d: d(x, 2), "few": lambda d: d(x[:2], 2), "mean": lambda d: d.mean()(x)}
    draws["freeze"] = lambda d: d.freeze(2, torch.Generator().manual_seed(1))(x)
    draws["keyed"] = lambda d: d.keyed(1, torch.arange(len(x)), 2)(x)
    draws["at"] = lambda d: d.at(d.draw(x))(x)
    draws["module"] = lambda d: d.as_module(num_samples=2)(x)
    draws["labels"] = lambda d: d.guide(x) and d.model(x)
    return draws


@pytest.mark.parametrize(
    "build", [pd.deterministic, pd.defenses.bayesian, partial(pd.defenses.rse, before_linear=True)]
)
@pytest.mark.parametrize("layer", LAYERS)
def test_no_look_at_a_defense_depends_on_its_mode(layer, build):
    x, _ = data(6)
    defense = build(hidden_net(layer))
    for name, look in looks(x).items():
        if name == "labels" and not defense.stochastic:
            continue

        def number(d, look=look):
            torch.manual_seed(5)
            return look(d).detach()

        torch.testing.assert_close(
            *same_in_both_modes(defense, number), msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(
    "layer", ["stochastic depth", "functional dropout", "RReLU", "LSTM", "encoder layer"]
)
def test_evaluate_after_fit_is_evaluate_after_eval(layer):
    x, y = data()
    defense = pd.defenses.rse(hidden_net(layer), before_linear=True, num_data=len(x)).train()
    pd.fit(defense, [(x, y)], epochs=1, progress=False)

    def number(d):
        rows = pd.evaluate(d, (x, y), PGD, eps=[0.1], num_samples=4, seed=0).rows
        return [(row["attack"], row["accuracy"]) for row in rows]

    first, second = same_in_both_modes(defense, number)
    assert first == second


@pytest.mark.parametrize("layer", LAYERS)
def test_frozen_functions_and_attacks_depend_on_their_seed_alone(layer):
    x, y = data(6)
    defense = pd.deterministic(hidden_net(layer).train())
    frozen = defense.freeze(2)
    assert torch.equal(frozen(x), frozen(x)) and torch.equal(frozen(x), defense.freeze(2)(x))
    first, second = (pd.attacks.pgd(defense, x, y, eps=0.1, num_steps=3, seed=0) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, x)
    assert torch.isfinite(torch.autograd.grad(defense(x.requires_grad_()).sum(), x)[0]).all()


def test_torchvision_networks_with_stochastic_depth():
    models = import_torchvision().models
    torch.manual_seed(0)
    net = models.efficientnet.EfficientNet(
        [models.efficientnet.MBConvConfig(2, 3, 1, 8, 8, 2)], 0.5, stochastic_depth_prob=0.5, num_classes=3
    )
    x = torch.rand(2, 3, 16, 16)
    first, second = same_in_both_modes(pd.defenses.bayesian(net), lambda d: d.mean()(x).detach())
    assert torch.equal(first, second)


def test_a_failing_network_gets_its_modes_back():
    net = nn.Sequential(Recurrent(), Encoder(), nn.Linear(4, 3)).train()
    with pytest.raises(ValueError, match="expected inputs that fit the network"):
        pd.deterministic(net)(torch.rand(2, 5))
    assert all(module.training for module in net.modules())
    assert net[0].cells.dropout == net[1].layer.self_attn.dropout == 0.5


def test_training_sees_what_is_random_in_training_mode():
    torch.manual_seed(0)
    defense, (x, y) = pd.deterministic(nn.Sequential(Recurrent(), Jitter(), nn.Linear(4, 3))), data(6)
    assert not torch.equal(defense.train().step(x, y).logits, defense.step(x, y).logits)
    assert torch.equal(defense.eval().step(x, y).logits, defense.step(x, y).logits)


def test_noise_keeps_the_mode_that_the_user_set():
    net = nn.Sequential(pd.nn.Noise(1.0, when="train"), Functional(), nn.Linear(4, 3))
    defense, x = pd.deterministic(net), data(3)[0]
    assert float(defense.train()(x, 50).detach().std(0).min()) > 0
    assert float(defense.eval()(x, 50).detach().std(0).max()) == 0


class Program(PyroModule):
    """A user's own model: one random weight, and layers that are random in training mode."""

    def __init__(self, layer):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3))
        self.shift = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, x, y=None):
        logits = self.net(x) + self.shift * torch.arange(3.0)
        with pyro.plate("data", size=50, subsample=x):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits


@pytest.mark.parametrize("layer", [Depth, Functional, Recurrent, Encoder])
def test_own_programs_stand_still_too(layer):
    torch.manual_seed(0)
    x, _ = data(6)
    model = Program(layer())
    guide = pyro.infer.autoguide.AutoNormal(pyro.poutine.block(model, hide=["y"]))
    defense = pd.Defense(model, guide, example=x)
    for name, look in looks(x).items():
        if name in ("keyed", "labels"):
            continue

        def number(d, look=look):
            torch.manual_seed(5)
            return look(d).detach()

        torch.testing.assert_close(
            *same_in_both_modes(defense, number), msg=lambda m, name=name: f"{name}: {m}"
        )
