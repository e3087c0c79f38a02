"""Planted faults fire the right check; honest models fire none."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.checks.bench import LEVEL, TOLERANCE, beyond
from probdefense.checks.optimization import _flat, _incomplete
from tests.conftest import trained_on_digits

QUICK = {"eps": 0.2, "num_gradients": 32, "num_samples": 4, "num_verdict": 10}


@pytest.fixture(scope="module")
def digits():
    defense, data = trained_on_digits(pd.deterministic, 120)
    return defense.net, data


class Changed(nn.Module):
    """A network with something done to its input and its logits."""

    def __init__(self, net, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x):
        return self.after(self.net(self.before(x)))


def drifting():
    """Answers that move a little with every query."""
    queries = []

    def change(logits):
        queries.append(0)
        return logits + 0.1 * len(queries) * torch.eye(10)[0]

    return change


FAULTS = {
    "rounded input": (
        {"before": lambda x: (x * 8).round() / 8},
        {"gradient": "defense masks", "gradient-free": "defense masks"},
    ),
    "detached input": (
        {"before": lambda x: x.detach()},
        {"gradient": "defense masks", "gradient-free": "defense masks"},
    ),
    "saturated logits": (
        {"after": lambda z: 1000 * z},
        {"gradient": "attack too weak", "gradient-free": "defense masks"},
    ),
    "rounded logits": (
        {"after": lambda z: z + (8 * z).round() - (8 * z)},
        {"stable loss": "defense masks"},
    ),
    "noise unless a gradient is taken": (
        {"before": lambda x: x if x.requires_grad else x + 0.2 * torch.randn_like(x)},
        {"declared randomness": "fault"},
    ),
    "undeclared noise": (
        {"before": lambda x: x + 0.2 * torch.randn_like(x)},
        {"declared randomness": "fault"},
    ),
    "probabilities": ({"after": lambda z: z.softmax(-1)}, {"logits": "fault"}),
    "whole-batch coupling": ({"before": lambda x: x - x.mean(0)}, {"no adaptation": "fault"}),
    "answers that drift": ({"after": drifting()}, {"no adaptation": "fault"}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_fires_its_check(name, digits):
    net, data = digits
    change, expected = FAULTS[name]
    found = pd.checks.run(pd.deterministic(Changed(net, **change)), *data, **QUICK)
    assert {check: found[check].verdict for check in expected} == expected, found.table()
    assert all(found[check].advice and found[check].evidence for check in expected)


def test_test_noise_that_attacks_do_not_see_is_found_behind_a_bare_callable(digits):
    net, data = digits

    def noisy(x):
        return net(x if x.requires_grad else x + 0.3 * torch.randn_like(x)).unsqueeze(0)

    found = pd.checks.run(noisy, *data, **QUICK)
    assert found["declared randomness"].verdict == "fault"
    assert found["declared randomness"].evidence["with a gradient by"] > 0.1


def test_noise_that_drowns_the_gradient_is_found(digits):
    net, data = digits

    class Drowned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient + 1e3 * gradient.abs().mean() * torch.randn_like(gradient)

    def noisy(x):
        return net(Drowned.apply(x) + 0.01 * torch.randn_like(x)).unsqueeze(0)

    found = pd.checks.run(noisy, *data, **QUICK)
    assert found["gradient signal"].verdict == "attack too weak"
    assert found["gradient signal"].evidence["signal to noise"] < 0.2


def honest(net):
    return {
        "plain": pd.deterministic(net),
        "rse": pd.defenses.rse(net, sigma_init=0.1, sigma_inner=0.05, before_linear=True),
        "bayesian": pd.defenses.bayesian(net, init_scale=0.02),
    }


@pytest.mark.parametrize("name", ["plain", "rse", "bayesian"])
def test_honest_models_fire_nothing(name, digits):
    net, (x, y) = digits
    defense = honest(net)[name]
    runs = [
        pd.checks.run(defense, x, y, **QUICK | {"eps": eps}, seed=seed) for seed, eps in enumerate((0.1, 0.2))
    ]
    assert [run.table() for run in runs if run.fired] == []


def test_every_check_has_a_verdict_and_the_run_repeats(digits):
    net, data = digits
    defense = honest(net)["rse"]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = pd.checks.run(defense, *data, **QUICK)
    assert torch.equal(state, torch.get_rng_state()), "the global random state moved"
    assert first == pd.checks.run(defense, *data, **QUICK)
    assert len({check.name for check in first}) == 18
    assert all(check.evidence or check.verdict == "not applicable" for check in first)


def test_an_attack_of_few_steps_is_called_too_weak():
    """The loss of a line rises as far as an attack goes; that of a reached corner does not."""
    line = np.tile(np.linspace(0, 1, 40)[:, None], (1, 150))
    all_stand, few_stand = np.ones(150, dtype=bool), np.arange(150) < 15
    assert _incomplete(line, all_stand).verdict == "attack too weak"
    assert _incomplete(np.minimum(line, 0.5), all_stand).verdict == "ok"
    assert _incomplete(line, few_stand).verdict == "ok"
    assert _flat(-line, all_stand).verdict == "defense masks"
    assert _flat(line, all_stand).verdict == _flat(-line, ~all_stand).verdict == "ok"
    assert _incomplete(line[:7], all_stand).verdict == _flat(line[:3], all_stand).verdict == "not applicable"


def test_a_comparison_minds_three_points_at_one_percent():
    generator = np.random.default_rng(0)

    def fires(difference, count=300):
        """How often it fires where the true difference is the given one and a tenth disagree."""
        wins = 0.05 + difference / 2
        table = generator.choice([1, 0, -1], p=[wins, 0.9, 0.1 - wins], size=(count, 400))
        return np.mean([beyond(row) for row in table])

    assert fires(0.0) == 0
    assert fires(TOLERANCE) <= LEVEL + 0.02
    assert fires(0.1) > 0.9


def test_the_table_names_what_to_do(digits):
    net, data = digits
    found = pd.checks.run(pd.deterministic(Changed(net, after=lambda z: z.softmax(-1))), *data, **QUICK)
    assert "logits" in found.table() and "return logits" in found.table()
    skips = sum(check.verdict == "not applicable" for check in found)
    assert skips and f"{len(list(found)) - skips} checks apply" in repr(found).splitlines()[0]
    assert f", {skips} do not apply" in repr(found).splitlines()[0]
    with pytest.raises(ValueError, match="unknown check 'luck'; known: logits"):
        found["luck"]


def test_an_attack_of_ones_own_takes_the_place_of_the_square_attack(digits):
    net, (x, y) = digits
    options = QUICK | {"norm": 1, "eps": 2.0}
    assert pd.checks.run(pd.deterministic(net), x, y, **options)["gradient-free"].verdict == "not applicable"
    own = partial(pd.attacks.pgd, num_steps=3)
    found = pd.checks.run(pd.deterministic(net), x, y, **options, gradient_free=own)
    assert found["gradient-free"].verdict == "ok"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "expected eps > 0"),
        ({"norm": 3}, "expected norm 1, 2 or math.inf"),
        ({"num_gradients": 0}, "expected num_gradients >= 1"),
        ({"num_samples": 0}, "expected num_samples >= 1"),
        ({"num_verdict": 0}, "expected num_verdict >= 1"),
    ],
)
def test_bad_settings_are_refused(options, message, digits):
    net, data = digits
    with pytest.raises(ValueError, match=message):
        pd.checks.run(pd.deterministic(net), *data, **QUICK | options)
