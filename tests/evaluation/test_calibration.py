"""Scores of probabilities, in cases computed by hand."""

import math

import pytest
import torch
from sklearn import metrics
from sklearn.calibration import calibration_curve

from probdefense.evaluation.calibration import calibration, reliability


def test_scores_by_hand():
    """Three examples: confidences .9, .7 and .7, the last one wrong."""
    probs = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.7, 0.3]])
    y = torch.tensor([0, 1, 1])
    found = calibration(probs.log(), y, num_bins=5)
    assert found.nll == pytest.approx(-(math.log(0.9) + math.log(0.7) + math.log(0.3)) / 3, rel=1e-6)
    assert found.brier == pytest.approx((0.02 + 0.18 + 0.98) / 3, rel=1e-6)
    assert found.accuracy == pytest.approx(2 / 3)
    # One example in (.8, 1], right at .9; two in (.6, .8], half of them right at .7.
    assert found.ece == pytest.approx((0.1 + 2 * 0.2) / 3, rel=1e-5)


def test_the_diagram_counts_every_example_once():
    probs = torch.rand(200, 4).softmax(-1)
    y = torch.randint(4, (200,))
    diagram = reliability(probs.log(), y, num_bins=7)
    assert float(diagram.size.sum()) == 200
    share = float((diagram.accuracy * diagram.size).sum() / 200)
    assert share == pytest.approx(float((probs.argmax(1) == y).float().mean()), abs=1e-6)
    edges = torch.arange(1, 8) / 7
    full = diagram.size > 0
    assert bool((diagram.confidence[full] <= edges[full] + 1e-6).all())
    assert bool((diagram.confidence[full] >= edges[full] - 1 / 7 - 1e-6).all())


def scored(count=500, classes=4):
    generator = torch.Generator().manual_seed(3)
    log_probs = (2 * torch.randn(count, classes, generator=generator)).double().log_softmax(-1)
    return log_probs, torch.randint(classes, (count,), generator=generator)


@pytest.mark.parametrize("num_bins", [5, 15])
def test_bins_are_those_of_scikit_learn(num_bins):
    log_probs, y = scored()
    confidence, label = log_probs.exp().max(-1)
    share, mean = calibration_curve(label == y, confidence, n_bins=num_bins)
    diagram = reliability(log_probs, y, num_bins=num_bins)
    full = diagram.size > 0
    assert diagram.accuracy[full].numpy() == pytest.approx(share)
    assert diagram.confidence[full].numpy() == pytest.approx(mean)


def test_scores_are_those_of_scikit_learn():
    log_probs, y = scored()
    found = calibration(log_probs, y)
    assert found.nll == pytest.approx(metrics.log_loss(y, log_probs.exp(), labels=range(4)))
    each = [metrics.brier_score_loss(y == k, log_probs[:, k].exp()) for k in range(4)]  # several at once: 1.7
    assert found.brier == pytest.approx(sum(each))


def test_certainty_falls_into_the_last_bin():
    diagram = reliability(torch.tensor([[0.0, -torch.inf]]), torch.tensor([0]), num_bins=3)
    assert diagram.size.tolist() == [0, 0, 1] and diagram.accuracy.tolist() == [0, 0, 1]


def test_probabilities_that_the_labels_are_drawn_from_are_calibrated():
    torch.manual_seed(0)
    log_probs = (2 * torch.randn(100_000, 3)).log_softmax(-1)
    y = torch.distributions.Categorical(logits=log_probs).sample()
    honest = calibration(log_probs, y)
    assert honest.ece < 0.01
    proud = calibration((3 * log_probs).log_softmax(-1), y)
    assert proud.ece > 0.1 and proud.nll > honest.nll and proud.brier > honest.brier


@pytest.mark.parametrize(
    ("y", "bins", "message"),
    [
        (torch.tensor([0, 2]), 5, "expected y < 2"),
        (torch.tensor([0]), 5, r"expected y of shape \(2,\)"),
        (torch.tensor([0, 1]), 0, "expected num_bins >= 1"),
    ],
)
def test_bad_arguments_are_refused(y, bins, message):
    with pytest.raises(ValueError, match=message):
        calibration(torch.zeros(2, 2).log_softmax(-1), y, num_bins=bins)
