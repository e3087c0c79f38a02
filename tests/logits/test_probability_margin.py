"""The margin of probabilities: its value, its sign beside the rule, and a gradient that one draw cannot take over."""

import torch

import probdefense as pd
from probdefense.logits.rules import margins


def test_it_is_the_difference_of_mean_probabilities():
    logits = torch.tensor([[[0.2, 0.5, 0.3]], [[0.6, 0.1, 0.3]]]).log()
    assert torch.allclose(pd.losses.probability_margin(logits, torch.tensor([0])), torch.tensor([-0.1]))


def test_its_sign_is_the_decision():
    logits, y = 5 * torch.randn(7, 200, 4), torch.randint(4, (200,))
    wrong = margins(pd.rules.mean_prob, logits, y)[0] <= 0
    assert torch.equal(pd.losses.probability_margin(logits, y) >= 0, wrong) and 0 < int(wrong.sum()) < 200


def test_a_draw_that_is_lost_for_good_weighs_nothing():
    logits = torch.tensor([[[0.0, 60.0]], [[0.5, 0.0]]], requires_grad=True)
    slopes = []
    for loss in (pd.losses.margin, pd.losses.probability_margin):
        (slope,) = torch.autograd.grad(loss(logits, torch.tensor([0])).sum(), logits)
        slopes.append(slope.abs().sum((1, 2)))
    assert torch.equal(slopes[0][0], slopes[0][1])
    assert float(slopes[1][0]) < 1e-12 < 0.1 < float(slopes[1][1])
