"""Bad inputs to ArviZ containers, plots, curves, HTML, the bridge and the data."""

import math

import numpy as np
import pytest
from torch import nn

import probdefense as pd
from tests.border.table import Case, named, prediction, refused, report, tree

ONE = np.zeros((2, 4), dtype=bool)
MUTE = pd.Report([])


def curve(results, eps=(0.0, 0.1), **options):
    return pd.analysis.robustness_curve(results, eps, **{"num_samples": 2, "num_warmup": 2, **options})


CONTAINERS = {
    "to_arviz of a network": (lambda w: pd.to_arviz(w.net, w.data), TypeError, "deterministic"),
    "to_arviz of nothing": (lambda w: pd.to_arviz([], w.data), TypeError, "Defense"),
    "to_arviz without data": (lambda w: pd.to_arviz(w.bayes), TypeError, r"data=\(x, y\)"),
    "to_arviz of a tensor": (lambda w: pd.to_arviz(w.bayes, w.x), TypeError, r"pair \(x, y\)"),
    "to_arviz of a loader": (lambda w: pd.to_arviz(w.bayes, w.loader), TypeError, r"pair \(x, y\)"),
    "to_arviz of lists": (
        lambda w: pd.to_arviz(w.bayes, (w.x.tolist(), w.y)),
        TypeError,
        "x as a torch.Tensor",
    ),
    "to_arviz of other labels": (
        lambda w: pd.to_arviz(w.bayes, (w.x, w.y + 1), num_samples=2),
        ValueError,
        "y < 3",
    ),
    "to_arviz of no draws": (
        lambda w: pd.to_arviz(w.bayes, w.data, num_samples=0),
        ValueError,
        "num_samples >= 1",
    ),
    "to_arviz of an empty report": (lambda w: pd.to_arviz(MUTE), ValueError, "rows"),
    "to_arviz of attacked text": (
        lambda w: pd.to_arviz(w.bayes, w.data, adversarial="x"),
        TypeError,
        "adversarial",
    ),
    "to_arviz of attacked inputs of another size": (
        lambda w: pd.to_arviz(w.bayes, w.data, num_samples=2, adversarial={0.1: w.x[:, :5]}),
        ValueError,
        "adversarial",
    ),
    "to_arviz of fewer attacked inputs": (
        lambda w: pd.to_arviz(w.bayes, w.data, num_samples=2, adversarial={0.1: w.x[:2]}),
        ValueError,
        "adversarial",
    ),
    "to_arviz of a prediction with other labels": (
        lambda w: pd.to_arviz(prediction(), (w.x, w.y[:2])),
        ValueError,
        "one label per example",
    ),
    "loo of a text": (lambda w: pd.analysis.loo("tree"), (TypeError, ValueError), "to_arviz"),
    "loo of None": (lambda w: pd.analysis.loo(None), (TypeError, ValueError), "to_arviz"),
    "loo of a report": (lambda w: pd.analysis.loo(report()), (TypeError, ValueError), "to_arviz"),
    "guide_k_hat of a network": (
        lambda w: pd.analysis.guide_k_hat(w.net, w.data),
        TypeError,
        "defense as Defense",
    ),
    "guide_k_hat of noise": (
        lambda w: pd.analysis.guide_k_hat(w.noisy, w.data),
        ValueError,
        "random weights",
    ),
    "guide_k_hat of a tensor": (lambda w: pd.analysis.guide_k_hat(w.bayes, w.x), TypeError, r"pair \(x, y\)"),
    "guide_k_hat of other labels": (
        lambda w: pd.analysis.guide_k_hat(w.bayes, (w.x, w.y + 1), num_samples=20),
        ValueError,
        "y < 3",
    ),
}

PLOTS = {
    "accuracy_chart of a text": (
        lambda w: pd.analysis.accuracy_chart("report"),
        TypeError,
        "report as Report",
    ),
    "accuracy_chart of nothing": (lambda w: pd.analysis.accuracy_chart(MUTE), ValueError, "rows"),
    "accuracy_chart by no rule": (
        lambda w: pd.analysis.accuracy_chart(report(), rule="median"),
        ValueError,
        "rule 'median'; known",
    ),
    "accuracy_chart at no radius": (
        lambda w: pd.analysis.accuracy_chart(report(), eps=0.7),
        ValueError,
        "eps .*0.1, 0.2",
    ),
    "robustness_curves of a text": (lambda w: pd.analysis.robustness_curves("report"), TypeError, "Report"),
    "robustness_curves of nothing": (lambda w: pd.analysis.robustness_curves(MUTE), ValueError, "rows"),
    "robustness_curves of no attack": (
        lambda w: pd.analysis.robustness_curves(report(), attack="cw"),
        ValueError,
        "attack 'cw'; known",
    ),
    "robustness_curves by no rule": (
        lambda w: pd.analysis.robustness_curves(report(), rule="median"),
        ValueError,
        "rule 'median'; known",
    ),
    "certified_vs_empirical of a report": (
        lambda w: pd.analysis.certified_vs_empirical(report(), w.y),
        TypeError,
        "certificate as Certificate",
    ),
    "certified_vs_empirical of other labels": (
        lambda w: pd.analysis.certified_vs_empirical(pd.certify(w.noisy, w.x, n0=2, n=4, seed=0), w.y[:2]),
        ValueError,
        "one label per example",
    ),
    "certified_vs_empirical in another norm": (
        lambda w: pd.analysis.certified_vs_empirical(
            pd.certify(w.noisy, w.x, n0=2, n=4, seed=0), w.y, report()
        ),
        ValueError,
        "L2 norm",
    ),
    "eot_convergence of nothing": (lambda w: pd.analysis.eot_convergence(MUTE), ValueError, "rows"),
    "eot_convergence of no attack": (
        lambda w: pd.analysis.eot_convergence(report(), attacks=["cw"]),
        ValueError,
        "draws per call",
    ),
    "reliability of a text": (lambda w: pd.analysis.reliability("p", w.y), TypeError, "Prediction"),
    "reliability of nothing": (lambda w: pd.analysis.reliability({}, w.y), ValueError, "prediction"),
    "reliability of other labels": (
        lambda w: pd.analysis.reliability(prediction(), w.y + 1),
        ValueError,
        "y < 3",
    ),
    "reliability in no bins": (
        lambda w: pd.analysis.reliability(prediction(), w.y, num_bins=0),
        ValueError,
        "num_bins >= 1",
    ),
    "entropies of text": (lambda w: pd.analysis.entropy_clean_attacked("a", "b"), TypeError, "Prediction"),
    "entropies of one": (
        lambda w: pd.analysis.entropy_clean_attacked(prediction(), None),
        TypeError,
        "Prediction",
    ),
    "image_grid of text": (lambda w: pd.analysis.image_grid("a", "b"), TypeError, "x as a torch.Tensor"),
    "image_grid of vectors": (lambda w: pd.analysis.image_grid(w.x, w.x), ValueError, "images"),
    "image_grid of two sizes": (
        lambda w: pd.analysis.image_grid(w.images, w.images[:, :, :3]),
        ValueError,
        "x_adv of shape",
    ),
    "image_grid of two channels": (
        lambda w: pd.analysis.image_grid(w.images.expand(2, 2, 6, 6), w.images.expand(2, 2, 6, 6)),
        ValueError,
        "1 or 3 channels",
    ),
    "image_grid amplified by nothing": (
        lambda w: pd.analysis.image_grid(w.images, w.images, amplify=0.0),
        ValueError,
        "amplify > 0",
    ),
    "loss_traces of a list": (
        lambda w: pd.analysis.loss_traces([np.zeros(3)]),
        TypeError,
        "losses as Mapping",
    ),
    "loss_traces of nothing": (lambda w: pd.analysis.loss_traces({}), ValueError, "at least one"),
    "loss_traces of text": (
        lambda w: pd.analysis.loss_traces({"a": "b"}),
        (TypeError, ValueError),
        "numbers",
    ),
    "loss_traces of no steps": (
        lambda w: pd.analysis.loss_traces({"a": np.zeros(0)}),
        ValueError,
        "at least one",
    ),
    "noise_scales of a text": (
        lambda w: pd.analysis.noise_scales("tree"),
        (TypeError, ValueError),
        "to_arviz",
    ),
    "noise_scales of weights": (lambda w: pd.analysis.noise_scales(tree()), ValueError, "noise"),
    "write_html of a text": (
        lambda w: pd.analysis.write_html("report", "/nowhere"),
        TypeError,
        "report as Report",
    ),
    "write_html of nothing": (lambda w: pd.analysis.write_html(MUTE, "/nowhere"), ValueError, "rows"),
    "write_html to a number": (
        lambda w: pd.analysis.write_html(report(), 3),
        TypeError,
        "folder as str or PathLike",
    ),
}

CURVES = {
    "a curve of one radius": (lambda w: curve({"a": ONE[:1]}, [0.1]), ValueError, "at least two radii"),
    "a curve of falling radii": (lambda w: curve({"a": ONE}, [0.1, 0.0]), ValueError, "rising"),
    "a curve without radii": (lambda w: curve({"a": ONE}, None), ValueError, "radii"),
    "a curve of radii as text": (lambda w: curve({"a": ONE}, "ab"), (TypeError, ValueError), "eps"),
    "a curve of NaN radii": (lambda w: curve({"a": ONE}, [0.0, math.nan]), ValueError, "radi"),
    "a curve of other shapes": (lambda w: curve({"a": ONE, "b": ONE[:, :2]}), ValueError, "all alike"),
    "a curve of one axis": (lambda w: curve({"a": ONE[0]}), ValueError, "radii, examples"),
    "a curve of nothing": (lambda w: curve({}), ValueError, "arrays"),
    "a curve of an array": (lambda w: curve(ONE), TypeError, "results as"),
    "a curve of no examples": (lambda w: curve({"a": ONE[:, :0]}), ValueError, "examples"),
    "a curve of shares": (lambda w: curve({"a": ONE + 0.5}), ValueError, "true or false"),
    "a curve of no attack": (lambda w: curve(report(), attack="cw"), ValueError, "attack 'cw'; known"),
    "a curve of no rule": (lambda w: curve(report(), rule="median"), ValueError, "rule 'median'; known"),
    "a curve of an empty report": (lambda w: curve(MUTE), ValueError, "rows"),
    "a curve of no draws": (lambda w: curve({"a": ONE}, num_samples=0), ValueError, "num_samples >= 1"),
    "a curve of no chains": (lambda w: curve({"a": ONE}, num_chains=0), ValueError, "num_chains >= 1"),
    "a curve of half a warmup": (
        lambda w: curve({"a": ONE}, num_warmup=0.5),
        TypeError,
        "num_warmup as an integer",
    ),
}

REST = {
    "nuts of noise": (lambda w: pd.numpyro.nuts(w.noisy, w.data), ValueError, "drawn for every example"),
    "nuts of a network": (lambda w: pd.numpyro.nuts(w.net, w.data), TypeError, "deterministic"),
    "nuts of no draws": (
        lambda w: pd.numpyro.nuts(w.bayes, w.data, num_samples=0),
        ValueError,
        "num_samples >= 1",
    ),
    "nuts of a tensor": (lambda w: pd.numpyro.nuts(w.bayes, w.x), TypeError, r"\(x, y\)"),
    "a last layer of a network": (
        lambda w: pd.numpyro.last_layer_nuts(w.net, w.data),
        TypeError,
        "deterministic",
    ),
    "a last layer that is not linear": (
        lambda w: pd.numpyro.last_layer_nuts(pd.deterministic(nn.Sequential(w.net, nn.Tanh())), w.data),
        ValueError,
        "ends in nn.Linear",
    ),
    "a bridge from a text": (lambda w: pd.numpyro.bridge("apply", {}), TypeError, "apply_fn as a function"),
    "a bridge of no draws": (lambda w: pd.numpyro.bridge(lambda p, x: x, {}), ValueError, "draws"),
    "a bridge of a list": (lambda w: pd.numpyro.bridge(lambda p, x: x, [1.0]), TypeError, "draws as Mapping"),
    "gold of a tensor": (
        lambda w: pd.numpyro.compare_to_gold(w.bayes, w.bayes, w.x),
        TypeError,
        r"pair \(x, y\)",
    ),
    "a data set of no name": (lambda w: pd.data.load("imagenet"), ValueError, "data set 'imagenet'; known"),
    "a data set of a number": (lambda w: pd.data.load(3), TypeError, "data set as a text"),
}

CASES = [Case(name, *row) for table in (CONTAINERS, PLOTS, CURVES, REST) for name, row in table.items()]


@pytest.mark.parametrize(**named(CASES))
def test_bad_inputs_of_analysis_are_refused(case):
    refused(case)
