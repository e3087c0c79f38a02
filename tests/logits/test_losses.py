"""Losses and rules on tiny cases that can be worked out by hand."""

import math

import pytest
import torch

import probdefense as pd
from probdefense import losses, rules

LOSSES = [
    losses.expected_cross_entropy,
    losses.predictive_cross_entropy,
    losses.margin,
    losses.predictive_margin,
    losses.dlr,
    losses.vote_margin,
]
TWO_DRAWS = torch.tensor([[[math.log(0.9), math.log(0.1)]], [[math.log(0.2), math.log(0.8)]]])
CLASS_0 = torch.tensor([0])


def test_by_hand():
    assert losses.expected_cross_entropy(TWO_DRAWS, CLASS_0).item() == pytest.approx(
        -(math.log(0.9) + math.log(0.2)) / 2
    )
    assert losses.predictive_cross_entropy(TWO_DRAWS, CLASS_0).item() == pytest.approx(-math.log(0.55))
    assert losses.margin(TWO_DRAWS, CLASS_0).item() == pytest.approx(
        (math.log(1 / 9) + math.log(4)) / 2, abs=1e-6
    )
    assert losses.predictive_margin(TWO_DRAWS, CLASS_0).item() == pytest.approx(math.log(0.45 / 0.55))
    z = torch.tensor([[[4.0, 1.0, 0.0, -2.0]]])
    assert losses.dlr(z, CLASS_0).item() == pytest.approx(-3 / 4)
    assert losses.dlr(z, torch.tensor([2])).item() == pytest.approx(4 / 4)
    votes = losses.vote_margin(TWO_DRAWS, CLASS_0).item()
    assert votes == pytest.approx((math.tanh(-math.log(9) / 2) + math.tanh(math.log(4) / 2)) / 2)


def test_jensen():
    logits, y = 3 * torch.randn(7, 50, 4), torch.randint(4, (50,))
    expected, predictive = (
        losses.expected_cross_entropy(logits, y),
        losses.predictive_cross_entropy(logits, y),
    )
    assert bool((expected >= predictive - 1e-6).all()) and float((expected - predictive).max()) > 0.1


@pytest.mark.parametrize("loss", LOSSES)
def test_a_constant_on_the_logits_changes_nothing(loss):
    logits, y = torch.randn(3, 5, 4, dtype=torch.float64), torch.randint(4, (5,))
    shift = 100 * torch.randn(3, 5, 1, dtype=torch.float64)
    torch.testing.assert_close(loss(logits + shift, y), loss(logits, y))
    torch.testing.assert_close(loss(logits.log_softmax(-1), y), loss(logits, y))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_gradients_are_finite_and_point_to_the_error(loss, scale):
    logits = (scale * torch.randn(6, 8, 5)).requires_grad_(True)
    y = torch.randint(5, (8,))
    (gradient,) = torch.autograd.grad(loss(logits, y).sum(), logits)
    assert bool(torch.isfinite(gradient).all())
    truth = gradient.gather(2, y.expand(6, -1).unsqueeze(2))
    assert float(truth.max()) <= 1e-6


def test_rules():
    assert torch.allclose(rules.mean_prob(TWO_DRAWS).exp(), torch.tensor([[0.55, 0.45]]))
    assert rules.vote(TWO_DRAWS).tolist() == [[0.5, 0.5]]
    assert rules.single_draw(TWO_DRAWS).argmax(-1).item() == 0
    assert rules.worst_of_draws(2)(TWO_DRAWS).tolist() == [[0.0, 0.0]]


def test_verdicts_by_rule():
    y = torch.tensor([0])
    assert rules.verdicts(rules.mean_prob, TWO_DRAWS, y).tolist() == [[True]]
    assert rules.verdicts(rules.single_draw, TWO_DRAWS, y).tolist() == [[True], [False]]
    assert rules.verdicts(rules.worst_of_draws(2), TWO_DRAWS, y).tolist() == [[False]]
    assert rules.verdicts(rules.vote, TWO_DRAWS, y).tolist() == [[False]], "a tie is an error"


def test_worst_of_draws_needs_every_draw():
    logits = torch.randn(6, 40, 3)
    y = torch.randint(3, (40,))
    every = (logits.argmax(-1) == y).view(3, 2, 40).all(1)
    assert torch.equal(rules.verdicts(rules.worst_of_draws(2), logits, y), every)


def test_unknown_rule():
    with pytest.raises(ValueError, match="unknown rule 'mode'; known: mean_prob, single_draw, vote"):
        pd.rules.as_rule("mode")
