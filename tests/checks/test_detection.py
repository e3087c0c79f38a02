"""Detection and abstention by hand, and an attack that knows the detector."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from sklearn import metrics

import probdefense as pd
from probdefense.checks.detection import (
    auroc,
    evading,
    mutual_information,
    predictive_entropy,
    select,
    threshold,
    uncertainty,
)
from tests.contract import defended
from tests.worlds import tiny_batch


def test_the_area_by_hand_and_by_counting_pairs():
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])).value == 1
    assert auroc(torch.tensor([1.0, 3.0]), torch.tensor([2.0])).value == 0.5
    assert auroc(torch.ones(4), torch.ones(3)).value == 0.5
    inside, outside = torch.randn(40).round(decimals=1), (torch.randn(30) + 0.5).round(decimals=1)
    wins = (outside[:, None] > inside).double() + 0.5 * (outside[:, None] == inside).double()
    assert auroc(inside, outside).value == pytest.approx(float(wins.mean()))
    strange = torch.cat([torch.zeros(40), torch.ones(30)])
    theirs = metrics.roc_auc_score(strange, torch.cat([inside, outside]))
    assert auroc(inside, outside).value == pytest.approx(theirs)


def test_the_interval_of_the_area_covers():
    """Normal scores a distance d apart have the area Phi(d / sqrt 2)."""
    for distance in (0.0, 1.0, 2.5):
        exact = float(torch.special.ndtr(torch.tensor(distance / math.sqrt(2))))
        hits = 0
        for _ in range(300):
            found = auroc(torch.randn(60), torch.randn(60) + distance)
            hits += found.low <= exact <= found.high
        assert hits / 300 > 0.95 - 4.3 * (0.0475 / 300) ** 0.5
    low, high = auroc(torch.zeros(30), torch.ones(30))[1:]
    assert low < 0.95 and high == pytest.approx(1)


def test_selection_by_hand():
    score = torch.tensor([0.1, 0.2, 0.3, 0.9])
    correct = torch.tensor([True, False, True, False])
    assert select(score, correct, 0.5) == pytest.approx((0.75, 2 / 3, 0.25))
    nothing = select(score, correct, 0.0)
    assert nothing.answered == nothing.errors == 0 and math.isnan(nothing.accuracy)
    assert threshold(torch.tensor([4.0, 1.0, 3.0, 2.0]), keep=0.5) == 2.0
    with pytest.raises(ValueError, match="expected keep in .0, 1., got 0"):
        threshold(score, keep=0)


def test_the_evading_loss_is_the_loss_minus_the_score():
    logits, y = torch.randn(5, 4, 3), torch.tensor([0, 1, 2, 0])
    plain = pd.losses.predictive_cross_entropy(logits, y)
    for score in (predictive_entropy, mutual_information):
        torch.testing.assert_close(evading(score, weight=2.0)(logits, y), plain - 2 * score(logits))
        torch.testing.assert_close(evading(score, loss=None)(logits, y), -score(logits))
    with pytest.raises(ValueError, match="expected weight > 0"):
        evading(predictive_entropy, weight=0.0)


def test_an_attack_that_knows_the_detector_is_detected_less(random_digits):
    defense, data = random_digits
    losses = {
        "blind": pd.losses.predictive_cross_entropy,
        "evading": evading(predictive_entropy, weight=0.3),
    }
    attacks = {
        name: pd.with_draws(partial(pd.attacks.pgd, num_steps=20, loss=loss), 8)
        for name, loss in losses.items()
    }
    report = pd.evaluate(defense, data, attacks, eps=0.2, num_samples=30)
    rows = {row["attack"]: row for row in uncertainty(report, keep=0.9)}
    assert rows["evading"]["auroc_high"] < 0.6 < rows["blind"]["auroc_low"]
    assert rows["evading"]["answered"] > rows["blind"]["answered"] + 0.2
    assert rows["evading"]["nll"] > rows["clean"]["nll"] + 1
    assert rows["clean"]["auroc"] == pytest.approx(0.5) and rows["clean"]["answered"] >= 0.9


def test_uncertainty_is_what_one_recomputes():
    defense, (x, y) = defended("bayesian on rse"), tiny_batch(20)
    report = pd.evaluate(defense, (x, y), {"fgsm": pd.attacks.fgsm, "null": lambda f, x, y: x}, num_samples=9)
    rows = uncertainty(report, score="mutual_information")
    assert [row["attack"] for row in rows] == ["clean", "fgsm", "null"]
    clean, attacked, null = rows
    log_probs = torch.as_tensor(report.arrays["log_probs/defense/clean/0"])
    np.testing.assert_allclose(clean["nll"], -log_probs[torch.arange(20), y].mean(), rtol=1e-6)
    total = pd.ops.entropy(log_probs)
    expected = torch.as_tensor(report.arrays["expected_entropy/defense/clean/0"])
    assert clean["predictive_entropy"] == pytest.approx(float(total.mean()))
    assert clean["mutual_information"] == pytest.approx(float((total - expected).mean()), abs=1e-6)
    assert {k: v for k, v in clean.items() if k not in ("attack", "eps")} == {
        k: v for k, v in null.items() if k not in ("attack", "eps")
    }
    assert attacked["nll"] > clean["nll"]
    with pytest.raises(
        ValueError, match="unknown score 'luck'; known: mutual_information, predictive_entropy"
    ):
        uncertainty(report, score="luck")
