"""Bad inputs to losses, rules, scores of probabilities and detectors."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import probdefense as pd
from tests.border.table import Case, World, named, prediction, refused, report

LOSSES = {
    name: getattr(pd.losses, name)
    for name in (
        "expected_cross_entropy",
        "predictive_cross_entropy",
        "margin",
        "predictive_margin",
        "predictive_log_odds",
        "probability_margin",
        "dlr",
        "vote_margin",
    )
}

PAIRS = {
    "no sample axis": (
        lambda w: (w.logits[0], w.y),
        ValueError,
        r"logits \(samples, batch, classes\), got \(4, 3\)",
    ),
    "logits as a list": (lambda w: (w.logits.tolist(), w.y), TypeError, "logits .*list"),
    "logits of integers": (lambda w: (w.logits.long(), w.y), TypeError, "int64"),
    "no draws": (lambda w: (w.logits[:0], w.y), ValueError, "logits"),
    "one class": (lambda w: (w.logits[..., :1], w.y * 0), ValueError, "TwoLogits"),
    "y as a list": (lambda w: (w.logits, [0, 1, 2, 0]), TypeError, "torch.as_tensor"),
    "y of floats": (lambda w: (w.logits, w.y.float()), TypeError, "regression"),
    "y of another length": (lambda w: (w.logits, w.y[:3]), ValueError, r"y of shape \(4,\)"),
    "y beyond the classes": (lambda w: (w.logits, w.y + 1), ValueError, "y < 3.*got 3"),
    "y negative": (lambda w: (w.logits, w.y - 1), ValueError, "y >= 0, got -1"),
    "y of torch's ignored class": (lambda w: (w.logits, w.y - 100), ValueError, "y >= 0, got -100"),
}

RULES = {"mean_prob": pd.rules.mean_prob, "vote": pd.rules.vote, "single_draw": pd.rules.single_draw}
RULES |= {"worst_of_draws": pd.rules.worst_of_draws(2)}
SCORES = {name: getattr(pd.detection, name) for name in ("predictive_entropy", "mutual_information")}

ALONE = {
    "no sample axis": (
        lambda w: w.logits[0],
        ValueError,
        r"logits \(samples, batch, classes\), got \(4, 3\)",
    ),
    "a list": (lambda w: w.logits.tolist(), TypeError, "logits .*list"),
    "None": (lambda w: None, TypeError, "NoneType"),
    "labels": (lambda w: w.logits.argmax(-1), TypeError, "int64"),
    "no draws": (lambda w: w.logits[:0], ValueError, "logits"),
    "one class": (lambda w: w.logits[..., :1], ValueError, "TwoLogits"),
}

log_probs = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(4, 1)

PROBABILITIES = {
    "log_probs as a list": (lambda w: (log_probs.tolist(), w.y), TypeError, "log_probs"),
    "log_probs as an array": (lambda w: (log_probs.numpy(), w.y), TypeError, "torch.as_tensor"),
    "log_probs of draws": (lambda w: (log_probs[None], w.y), ValueError, r"log_probs \(batch, classes\)"),
    "probabilities": (lambda w: (log_probs.exp(), w.y), ValueError, "log"),
    "logits": (lambda w: (log_probs - 3, w.y), ValueError, "log_softmax"),
    "NaN": (lambda w: (log_probs * math.nan, w.y), ValueError, "NaN"),
    "nothing": (lambda w: (log_probs[:0], w.y[:0]), ValueError, "at least one"),
    "y beyond the classes": (lambda w: (log_probs, w.y + 1), ValueError, "y < 3"),
    "y negative": (lambda w: (log_probs, w.y - 1), ValueError, "y >= 0"),
    "y of another length": (lambda w: (log_probs, w.y[:2]), ValueError, "one label per example"),
    "y as an array": (lambda w: (log_probs, w.y.numpy()), TypeError, "torch.as_tensor"),
    "a prediction": (lambda w: (prediction(), w.y), TypeError, "Prediction"),
}

scores = torch.tensor([0.1, 0.2, 0.3])

MADE = {
    "targeted_dlr: target beyond": (
        lambda w: pd.losses.targeted_dlr(w.logits, w.y, w.y + 3),
        ValueError,
        "target < 3",
    ),
    "targeted_dlr: target as a list": (
        lambda w: pd.losses.targeted_dlr(w.logits, w.y, [1, 2, 0, 1]),
        TypeError,
        "target as int64",
    ),
    "worst_of_draws of none": (lambda w: pd.rules.worst_of_draws(0), ValueError, "num_queries >= 1"),
    "worst_of_draws of a text": (
        lambda w: pd.rules.worst_of_draws("2"),
        TypeError,
        "num_queries as an integer",
    ),
    "a rule of no name": (
        lambda w: pd.rules.as_rule("median"),
        ValueError,
        "rule 'median'; known: mean_prob",
    ),
    "a rule of a number": (lambda w: pd.rules.as_rule(3), TypeError, "rule as a function"),
    "reliability in no bins": (
        lambda w: pd.calibration.reliability(log_probs, w.y, num_bins=0),
        ValueError,
        "num_bins >= 1",
    ),
    "calibration in half a bin": (
        lambda w: pd.calibration.calibration(log_probs, w.y, num_bins=0.5),
        TypeError,
        "num_bins as an integer",
    ),
    "evading a name": (lambda w: pd.detection.evading("entropy"), TypeError, "score as a function"),
    "evading without weight": (
        lambda w: pd.detection.evading(pd.detection.mutual_information, weight=0.0),
        ValueError,
        "weight > 0",
    ),
    "evading a text of a loss": (
        lambda w: pd.detection.evading(pd.detection.mutual_information, loss="ce"),
        TypeError,
        "loss as a function",
    ),
    "auroc of nothing familiar": (lambda w: pd.detection.auroc(scores[:0], scores), ValueError, "familiar"),
    "auroc of nothing strange": (lambda w: pd.detection.auroc(scores, scores[:0]), ValueError, "strange"),
    "auroc of a list": (lambda w: pd.detection.auroc([0.1], scores), TypeError, "familiar"),
    "auroc of two axes": (
        lambda w: pd.detection.auroc(scores[None], scores),
        ValueError,
        r"familiar .*\(n,\)",
    ),
    "auroc of NaN": (lambda w: pd.detection.auroc(scores, scores * math.nan), ValueError, "NaN"),
    "threshold of nothing": (lambda w: pd.detection.threshold(scores[:0]), ValueError, "familiar"),
    "threshold of a list": (lambda w: pd.detection.threshold([0.1, 0.2]), TypeError, "familiar"),
    "threshold that keeps nothing": (
        lambda w: pd.detection.threshold(scores, keep=0.0),
        ValueError,
        r"keep in \(0, 1\]",
    ),
    "threshold that keeps more": (
        lambda w: pd.detection.threshold(scores, keep=1.5),
        ValueError,
        r"keep in \(0, 1\]",
    ),
    "threshold that keeps a text": (
        lambda w: pd.detection.threshold(scores, keep="all"),
        TypeError,
        "keep as a number",
    ),
    "threshold of NaN": (lambda w: pd.detection.threshold(scores * math.nan), ValueError, "NaN"),
    "select of unequal lengths": (
        lambda w: pd.detection.select(scores, torch.tensor([True]), 0.2),
        ValueError,
        r"correct .*\(3,\)",
    ),
    "select of a list": (lambda w: pd.detection.select([0.1], torch.tensor([True]), 0.2), TypeError, "score"),
    "select of listed answers": (
        lambda w: pd.detection.select(scores, [True] * 3, 0.2),
        TypeError,
        "correct",
    ),
    "select by a text": (
        lambda w: pd.detection.select(scores, scores > 0, "0.2"),
        TypeError,
        "limit as a number",
    ),
    "select of nothing": (
        lambda w: pd.detection.select(scores[:0], scores[:0] > 0, 0.2),
        ValueError,
        "score",
    ),
    "uncertainty of no report": (lambda w: pd.detection.uncertainty("report"), TypeError, "report as Report"),
    "uncertainty of no rows": (lambda w: pd.detection.uncertainty(pd.Report([])), ValueError, "rows"),
    "uncertainty by no score": (
        lambda w: pd.detection.uncertainty(report(), score="margin"),
        ValueError,
        "score 'margin'; known: mutual_information",
    ),
    "uncertainty by a function": (
        lambda w: pd.detection.uncertainty(report(), score=pd.detection.mutual_information),
        TypeError,
        "score as a text",
    ),
    "uncertainty that keeps nothing": (
        lambda w: pd.detection.uncertainty(report(), keep=0),
        ValueError,
        r"keep in \(0, 1\]",
    ),
}

SOURCES = {"calibration": pd.calibration.calibration, "reliability": pd.calibration.reliability}

CASES = [
    *(
        Case(f"{label}: {name}", lambda w, f=loss, m=make: f(*m(w)), kind, match)
        for label, loss in LOSSES.items()
        for name, (make, kind, match) in PAIRS.items()
    ),
    *(
        Case(f"{label}: {name}", lambda w, f=rule, m=make: f(m(w)), kind, match)
        for label, rule in {**RULES, **SCORES}.items()
        for name, (make, kind, match) in ALONE.items()
    ),
    *(
        Case(f"{label}: {name}", lambda w, f=score, m=make: f(*m(w)), kind, match)
        for label, score in SOURCES.items()
        for name, (make, kind, match) in PROBABILITIES.items()
    ),
    *(Case(name, call, kind, match) for name, (call, kind, match) in MADE.items()),
]


@pytest.mark.parametrize(**named(CASES))
def test_bad_logits_scores_and_labels_are_refused(case):
    refused(case)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_losses_take_any_float(name, dtype):
    world = World()
    found = LOSSES[name](world.logits.to(dtype), world.y)
    torch.testing.assert_close(
        found.double(), LOSSES[name](world.logits.double(), world.y), rtol=2e-2, atol=2e-2
    )


def test_the_expected_cross_entropy_is_that_of_torch():
    world = World()
    logits = world.logits.requires_grad_()
    wanted = torch.stack([nn.functional.cross_entropy(z, world.y, reduction="none") for z in logits]).mean(0)
    found = pd.losses.expected_cross_entropy(logits, world.y)
    torch.testing.assert_close(found, wanted)
    slopes = [torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (found, wanted)]
    torch.testing.assert_close(*slopes)


def test_scores_of_numpy_numbers():
    assert pd.detection.threshold(scores, keep=np.float32(1.0)) == pytest.approx(0.3)
    assert pd.detection.select(scores, scores > 0.15, np.float64(0.25)).answered == pytest.approx(2 / 3)
