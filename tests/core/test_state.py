"""A state says which function it belongs to: settings travel with it, and others are refused."""

import copy
import warnings

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import probdefense as pd
from tests.contract import BUILDERS, defended
from tests.worlds import tiny_batch, tiny_net

d = pd.defenses


def mixture(family):
    """Two kinds of elements of one family."""
    kinds = dist.Categorical(torch.ones(2))
    return dist.MixtureSameFamily(kinds, family(torch.zeros(2), torch.tensor([0.1, 1.0])))


PAIRS = {
    "kappa": (lambda: d.jump_relu(tiny_net(), kappa=0.1), lambda: d.jump_relu(tiny_net(), kappa=0.2)),
    "threshold.family": (
        lambda: d.jump_relu(tiny_net(), kappa=dist.Uniform(0.0, 0.2)),
        lambda: d.jump_relu(tiny_net(), kappa=dist.Uniform(0.05, 0.15)),
    ),
    "keep": (lambda: d.mc_dropout(tiny_net(), rate=0.1), lambda: d.mc_dropout(tiny_net(), rate=0.5)),
    "ceiling": (lambda: d.brelu(tiny_net(), ceiling=1.0), lambda: d.brelu(tiny_net(), ceiling=2.0)),
    "floor": (
        lambda: d.rse(tiny_net(), scale="learned", floor=0.01),
        lambda: d.rse(tiny_net(), scale="learned", floor=0.02),
    ),
    "when": (lambda: d.rse(tiny_net()), lambda: d.rse(tiny_net(), when="test")),
    "multiplicative": (lambda: d.rse(tiny_net()), lambda: d.rse(tiny_net(), multiplicative=True)),
    "place": (
        lambda: d.pni(tiny_net(), place="input"),
        lambda: d.pni(tiny_net(), place="output"),
    ),
    "eps.family": (lambda: d.rse(tiny_net()), lambda: d.rse(tiny_net(), family=dist.Normal(0.0, 3.0))),
    "guide.posteriors.weights.kind": (
        lambda: d.bayesian(tiny_net(), num_data=10),
        lambda: d.bayesian(tiny_net(), num_data=10, family=dist.Laplace),
    ),
    "structure": (
        lambda: d.bayesian(tiny_net(), num_data=10, prior=mixture(dist.Normal)),
        lambda: d.bayesian(tiny_net(), num_data=10, prior=mixture(dist.Laplace)),
    ),
    "guide.posteriors.weights.floor": (
        lambda: d.bayesian(tiny_net(), num_data=10),
        lambda: d.bayesian(tiny_net(), num_data=10, floor=1e-3),
    ),
    "guide.posteriors.weights.ceiling": (
        lambda: d.bayesian(tiny_net(), num_data=10),
        lambda: d.bayesian(tiny_net(), num_data=10, ceiling=0.5),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_state_of_another_function_is_refused_by_name(name):
    saved, other = (make() for make in PAIRS[name])
    before = {key: value.clone() for key, value in other.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(ValueError, match=rf"{name} is .* there, .* here"):
            other.load_state_dict(saved.state_dict(), strict=strict)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    again = PAIRS[name][0]()
    again.load_state_dict(saved.state_dict())


@pytest.mark.parametrize("name", PAIRS)
def test_a_file_without_settings_loads_with_a_warning(name):
    saved, same = PAIRS[name][0](), PAIRS[name][0]()
    state = {key: value for key, value in saved.state_dict().items() if "_extra_state" not in key}
    with pytest.warns(UserWarning, match="does not say with which settings"):
        same.load_state_dict(state, strict=True)
    assert "_extra_state" not in state
    with pytest.warns(UserWarning), torch.no_grad():
        pd.LossModule(same).load_state_dict({f"defense.{key}": value for key, value in state.items()})


def test_a_plain_network_has_no_settings_to_miss():
    net, other = (pd.deterministic(tiny_net()) for _ in range(2))
    state = {key: value for key, value in net.state_dict().items() if key != "_extra_state"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(state)


@pytest.mark.parametrize("builder", BUILDERS)
def test_every_entry_of_a_state_is_a_tensor_and_comes_back(builder, tmp_path):
    defense, (x, _) = defended(builder).eval(), tiny_batch(3)
    state = defense.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    torch.save(state, tmp_path / "state.pt")
    twin = copy.deepcopy(defense)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.manual_seed(3)
    ours = defense(x, 4)
    torch.manual_seed(3)
    assert torch.equal(ours, twin(x, 4))


def test_numbers_that_come_with_a_state_are_those_that_are_drawn():
    """The buffers of a family may be replaced: then both paths, ours and Pyro's, draw from the new one."""
    wide = d.rse(nn.Linear(4, 3), before_linear=True, family=dist.Normal(0.0, 3.0), sigma_init=1.0)
    built = d.rse(nn.Linear(4, 3), before_linear=True, sigma_init=1.0)
    state = {key: value for key, value in wide.state_dict().items() if key != "_extra_state"}
    with pytest.warns(UserWarning, match="does not say"):
        built.load_state_dict(state)
    x = torch.zeros(5000, 4)
    assert float(built.draw(x)["input_noise"].std()) == pytest.approx(3.0, rel=0.05)
    assert float(built.guide(x)["input_noise"].std()) == pytest.approx(3.0, rel=0.05)


def test_a_state_that_is_none_of_ours_is_named():
    defense = d.rse(tiny_net())
    state = defense.state_dict() | {"_extra_state": torch.tensor([1, 2, 3], dtype=torch.uint8)}
    with pytest.raises(ValueError, match="expected the settings of a defense in its state"):
        defense.load_state_dict(state)
