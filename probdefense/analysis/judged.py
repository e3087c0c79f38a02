"""Reports and predictions as ArviZ containers."""

import json
import math
from typing import Any

import numpy as np
import torch

from probdefense.analysis.fits import Named
from probdefense.analysis.trees import Groups, Names, placed, whole
from probdefense.evaluation.report import Report, check_report
from probdefense.prediction.predictive import Prediction
from probdefense.rng import derive, forked
from probdefense.types import Labels
from probdefense.validation import check_labels

ENTROPIES = ("predictive_entropy", "expected_entropy", "mutual_information")


def of_prediction(prediction: Prediction, y: Labels | None, num_samples: int, seed: int, names: Names) -> Any:
    """Labels drawn from a prediction, and its probabilities and entropies."""
    constants, (batch, classes) = ("probs", "label", *ENTROPIES), prediction.probs.shape
    with forked(derive(seed, "labels")):
        drawn = torch.distributions.Categorical(logits=prediction.log_probs.cpu()).sample((num_samples,))
    groups: Groups = {
        "posterior_predictive": {"y": drawn.numpy()[None]},
        "constant_data": {
            **{name: getattr(prediction, name).detach().cpu().numpy() for name in constants},
            "num_samples": np.broadcast_to(np.asarray(prediction.num_samples), batch).copy(),
        },
    }
    if y is not None:
        check_labels(y, batch)
        groups["observed_data"] = {"y": y.cpu().numpy()}
    axes = {name: ["example"] for name in ("y", "num_samples", *constants)} | {"probs": ["example", "class"]}
    sizes = {"example": np.arange(batch), "class": np.arange(classes)}
    tree = placed(groups, Named({}, axes, sizes), no_dims(names))
    return whole([tree], names, {"seed": seed, "defense": "of a prediction", "rule": "mean_prob"})


def no_dims(names: Names) -> Names:
    """The names of the caller, where all axes have one already.

    Raises:
        ValueError: names for axes too.
    """
    if names.dims:
        raise ValueError(
            f"expected dims= for a defense, got them for {sorted(names.dims)}; the axes of a report and of a "
            "prediction have names: give coords="
        )
    return names


def of_report(report: Report, num_samples: int, seed: int, names: Names) -> Any:
    """Draws of every accuracy of a report, paired."""
    place = ("defense", "attack", "eps", "rule")
    check_report(report)
    labels = [report.arrays.key(*(row[name] for name in place)) for row in report.rows]
    correct = [report.arrays.at("correct", label) for label in labels]
    sizes = {verdicts.shape[1] for verdicts in correct}
    if len(sizes) != 1:
        raise ValueError(
            f"expected rows on the same examples, got {sorted(sizes)} examples; evaluate all on the same data"
        )
    about = ("defense", "attack", "eps", "rule", "attack_samples", "gradients")
    groups: Groups = {
        "posterior": {"accuracy": _bootstrap(correct, num_samples, seed)[None]},
        "observed_data": {"correct": np.stack([verdicts.mean(0) for verdicts in correct])},
        "constant_data": {name: np.array([_plain(row.get(name)) for row in report.rows]) for name in about},
    }
    axes = {name: ["row"] for name in ("accuracy", *about)} | {"correct": ["row", "example"]}
    named = Named({}, axes, {"row": labels, "example": np.arange(sizes.pop())})
    rules = ", ".join(dict.fromkeys(row["rule"] for row in report.rows))
    made = {"seed": seed, "defense": ", ".join(report.defenses), "rule": rules}
    tree = whole([placed(groups, named, no_dims(names))], names, made)
    tree["posterior"].attrs["settings"] = json.dumps(report.settings, default=str)
    return tree


def _plain(value: Any) -> Any:
    return math.nan if value is None else value


def _bootstrap(correct: list[np.ndarray], num_samples: int, seed: int) -> np.ndarray:
    r"""Draws of every row's accuracy, ``(draws, rows)``, with common weights for all rows.

    Rubin, 1981, [The Bayesian Bootstrap](https://doi.org/10.1214/aos/1176345338). Weights of examples
    are Dirichlet(1, ..., 1, 1/2, 1/2), the last two on an example that is right and one that is wrong:
    with one verdict per example this is exactly Beta(k + 1/2, n - k + 1/2), never degenerate. Several
    verdicts per example have a Dirichlet(1, ..., 1) of their own.
    """
    rng = np.random.default_rng(seed)
    examples = rng.exponential(size=(num_samples, correct[0].shape[1]))
    right, wrong = rng.gamma(0.5, size=(2, num_samples))
    by_count = {count: rng.exponential(size=(num_samples, count)) for count in {len(v) for v in correct}}
    total = examples.sum(1) + right + wrong
    columns = []
    for verdicts in correct:
        weights = by_count[len(verdicts)] / by_count[len(verdicts)].sum(1, keepdims=True)
        columns.append(((examples * (weights @ verdicts)).sum(1) + right) / total)
    return np.stack(columns, axis=1)
