"""What must work: dtypes, gradient modes, networks that work in place, everywhere and with the right value."""

from functools import partial

import pytest
import torch
from torch import nn

import probdefense as pd
from tests.border.table import World, unchanged

CALLS = {
    "predict": lambda f, x, y: pd.predict(f, x, 2, seed=0).log_probs,
    "predict until settled": lambda f, x, y: pd.predict(f, x, 8, alpha=0.2, seed=0).log_probs,
    "evaluate": lambda f, x, y: accuracies(
        pd.evaluate(f, (x, y), {"pgd": partial(pd.attacks.pgd, num_steps=2)}, eps=0.1, num_samples=2)
    ),
    "checks": lambda f, x, y: torch.tensor(
        [
            value
            for check in pd.checks.run(f, x, y, eps=0.1, num_gradients=4, num_samples=2, num_verdict=4)
            for value in check.evidence.values()
        ]
    ),
    "suite": lambda f, x, y: pd.attacks.suite(f, x, y, eps=0.1, budget=250, seed=0),
    "restarts": lambda f, x, y: pd.attacks.pgd(f, x, y, eps=0.1, num_steps=2, num_restarts=2, seed=0),
    "apgd": lambda f, x, y: pd.attacks.apgd(f, x, y, eps=0.1, num_steps=4, seed=0),
    "gradient_signal": lambda f, x, y: (
        pd.attacks.diagnostics.gradient_signal(f, x, y, num_samples=2, seed=0).agreement
    ),
}
CERTIFY = {"certify": lambda f, x, y: pd.certify(f, x, n0=4, n=8, seed=0).radius}
every_call = pytest.mark.parametrize("name", {**CALLS, **CERTIFY})


def accuracies(report):
    return torch.tensor([row["accuracy"] for row in report.rows])


def called(name, world, x=None):
    defense = world.noisy if name in CERTIFY else world.plain
    return {**CALLS, **CERTIFY}[name](defense, world.x if x is None else x, world.y)


@every_call
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_modes_change_nothing(name, mode):
    world = World()
    wanted, before = called(name, world), world.state()
    with mode():
        found = called(name, world)
    torch.testing.assert_close(found.clone(), wanted, rtol=0, atol=0)
    unchanged(before, world.state())


@every_call
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_any_float_are_asked_in_their_dtype(name, dtype):
    world = World()
    wanted = called(name, world)
    for defense in (world.plain, world.noisy):
        defense.to(dtype)
    found = called(name, world, world.x.to(dtype))
    assert bool(torch.isfinite(found).all())
    if name.startswith("predict"):
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(found.float(), wanted.float(), rtol=0.05, atol=0.05)
    if name in ("suite", "restarts", "apgd"):
        assert found.dtype == dtype


@every_call
def test_under_autocast_as_without(name):
    world = World()
    wanted = called(name, world)
    with torch.autocast("cpu", torch.bfloat16):
        found = called(name, world)
    assert found.dtype == wanted.dtype and bool(torch.isfinite(found).all())
    if name.startswith("predict"):
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


class InPlace(nn.Module):
    """Normalizes where it stands."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.sub_(0.5).mul_(2.0))


def pairs(world, name):
    """A network that works in place, and one that does the same elsewhere."""
    moved = nn.Sequential(pd.nn.Normalize([0.5] * 6, [0.5] * 6), world.net)
    if name in CERTIFY:
        noisy = partial(pd.defenses.rse, sigma_init=0.25, where=lambda path, _: path == "")
        return noisy(InPlace(world.net)), noisy(moved)
    return pd.deterministic(InPlace(world.net)), pd.deterministic(moved)


@every_call
def test_networks_that_work_in_place_change_no_inputs(name):
    world = World()
    before = world.x.clone()
    found, wanted = ({**CALLS, **CERTIFY}[name](f, world.x, world.y) for f in pairs(world, name))
    assert torch.equal(world.x, before)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_training_and_calls_change_no_inputs_of_such_networks():
    world = World()
    defense, before = pd.deterministic(InPlace(world.net), num_data=4), world.x.clone()
    pd.fit(defense, world.loader, epochs=2, progress=False)
    pd.objectives.elbo(defense, *world.data)
    defense(world.x), defense.mean()(world.x), defense.freeze(1)(world.x), defense.drawn(world.x, seed=0)
    pd.to_arviz(defense, world.data, num_samples=2)
    assert torch.equal(world.x, before)


def test_answers_in_tuples_are_taken_by_the_way_out():
    world = World()

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = world.net

        def forward(self, x):
            return (self.net(x), None)[0]

    assert torch.equal(pd.deterministic(First())(world.x), world.plain(world.x))
