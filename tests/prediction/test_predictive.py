"""The predictive and its uncertainty, in cases whose answer is known."""

import math

import pytest
import torch
from torch import nn

import probdefense as pd
from probdefense.ops import entropy
from tests.contract import BUILDERS, DETERMINISTIC, defended
from tests.worlds import LinearWorld, monte_carlo_tolerance, tiny_batch


def test_two_sure_draws_that_disagree_by_hand():
    """Total uncertainty log 2, none of it expected, all of it disagreement."""
    logits = torch.tensor([[[0.0, 500.0]], [[500.0, 0.0]]])
    found = pd.predict(lambda x, num_samples: logits, torch.rand(1, 2), 2)
    torch.testing.assert_close(found.probs, torch.tensor([[0.5, 0.5]]))
    assert float(found.predictive_entropy) == pytest.approx(math.log(2))
    assert float(found.expected_entropy) == pytest.approx(0, abs=1e-6)
    assert float(found.mutual_information) == pytest.approx(math.log(2))


def test_probabilities_that_underflow_stay_finite():
    logits = torch.tensor([[[0.0, 400.0]], [[0.0, 300.0]]])
    found = pd.predict(lambda x, num_samples: logits, torch.rand(1, 2), 2)
    assert float(found.log_probs[0, 0]) == pytest.approx(-300 - math.log(2))
    assert bool(torch.isfinite(found.predictive_entropy).all())


def test_entropy_counts_impossible_classes_as_nothing():
    assert float(entropy(torch.tensor([1.0, 0.0]).log())) == 0
    assert float(entropy(torch.zeros(8).log_softmax(-1))) == pytest.approx(math.log(8))


@pytest.mark.parametrize("name", BUILDERS)
def test_uncertainty_has_a_sign_and_a_seed_fixes_it(name):
    defense, (x, _) = defended(name), tiny_batch()
    state = torch.get_rng_state()
    first, second = (pd.predict(defense, x, 8, seed=3) for _ in range(2))
    assert torch.equal(first.log_probs, second.log_probs) and torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(first.probs.sum(-1), torch.ones(6))
    assert bool((first.mutual_information >= 0).all()) and bool(first.settled.all())
    assert bool((first.predictive_entropy <= math.log(3) + 1e-6).all())
    assert torch.equal(first.label, first.log_probs.argmax(-1))
    assert first.num_samples == (1 if name in DETERMINISTIC else 8)
    assert not first.log_probs.requires_grad


def test_the_mean_probability_of_the_linear_world_is_exact():
    """Steep logits make a draw's probability a vote, whose mean is known in closed form."""
    world = LinearWorld(slope=1e4)
    x, _ = world.points(6)
    draws = 4000
    found = pd.predict(world.noisy(), x, draws, seed=0).probs[:, 1]
    exact = world.share_of_one(x)
    assert float((found - exact).abs().max()) < monte_carlo_tolerance(0.5, draws)
    other = LinearWorld(slope=1e4, sigma=0.4).share_of_one(x)
    assert float((found - other).abs().max()) > monte_carlo_tolerance(0.5, draws)


def test_a_plain_network_agrees_with_itself():
    net, x = nn.Linear(4, 3), torch.rand(5, 4)
    found = pd.predict(pd.deterministic(net), x)
    torch.testing.assert_close(found.log_probs, net(x).log_softmax(-1).detach())
    assert float(found.mutual_information.max()) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "expected num_samples >= 1"),
        ({"alpha": 0.0}, "expected alpha > 0"),
        ({"alpha": 1.0}, "expected 0 < alpha < 1, got 1.0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pd.predict(defended("rse"), tiny_batch()[0], **options)


def test_bad_inputs_are_refused():
    with pytest.raises(ValueError, match=r"expected x in \[0, 1\]"):
        pd.predict(defended("rse"), 2 + tiny_batch()[0])
    with pytest.raises(ValueError, match=r"expected logits \(samples, 6, classes\)"):
        pd.predict(lambda x: torch.zeros(1, 2, 3), tiny_batch()[0])
