r"""Defenses, reports and predictions as ArviZ containers, for ArviZ 0.23 and 1.x alike.

Everything carries named axes and starts with ``(chain, draw)``. A chain is one independent fit: draws
of one guide are independent by construction, so agreement between them says nothing about the fit.
"""

import inspect
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import probdefense
from probdefense.analysis.chains import chains_of, in_chains
from probdefense.analysis.fits import Fit, Named, constants, random, read_fit
from probdefense.analysis.pictures import groups_of
from probdefense.core.defense import Defense
from probdefense.evaluation.report import Report, check_report
from probdefense.prediction.predictive import Prediction
from probdefense.rng import derive, forked
from probdefense.types import Inputs, Labels
from probdefense.validation import (
    check_classes,
    check_count,
    check_examples,
    check_kind,
    check_labels,
    check_like,
    check_seed,
)

DRAWN = ("posterior", "posterior_predictive", "prior", "prior_predictive")
"""Groups of draws."""

Groups = dict[str, dict[str, np.ndarray]]

ENTROPIES = ("predictive_entropy", "expected_entropy", "mutual_information")


def to_arviz(
    source: Defense | Sequence[Defense] | Report | Prediction,
    data: tuple[Inputs, Labels] | None = None,
    *,
    num_samples: int = 100,
    adversarial: Mapping[float, Inputs] | None = None,
    weights: bool = False,
    seed: int = 0,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    class_names: Sequence[str] | None = None,
) -> Any:
    r"""An ArviZ container (``InferenceData`` in 0.x, ``DataTree`` in 1.x) with named axes.

    Of a defense: **posterior** holds what varies by draw: ``noise_rms`` by layer, ``weight_rms`` by random
    parameter, and the draws of the last layer and of hyper-parameters (what other priors depend on);
    **prior** the same drawn from the priors (where every site has one), **log_prior** their density at the
    draws of the guide, by site; **posterior_predictive** and **prior_predictive** the probabilities and a
    sampled label of every draw; **log_likelihood** $\log p(y_i \mid x_i, \theta_s, \varepsilon_s)$ in
    nats; **predictions** the probabilities on adversarial inputs by radius; **observed_data** the labels;
    **constant_data** the inputs, and what no draw changes: ``noise_scale`` by layer, ``weight_scale``
    $\sigma$, ``signal_to_noise`` $|\mu| / \sigma$ and ``prior_scale`` by parameter. A latent of yours named
    ``weight_rms`` keeps its name, and ours becomes ``weight_rms_1``. Several defenses of one kind, fitted
    independently, become several chains, and then R-hat says whether fits agree; with one fit no R-hat is
    claimed. Samples of `from_samples` come by chain and in their order, at most `num_samples` of each,
    evenly spaced; those of other weights than equal ones are drawn.

    Of a report: **posterior** holds draws of every accuracy from one weighted Bayesian bootstrap over
    examples and draws, so differences of rows are paired. Of a prediction: **posterior_predictive**
    holds labels drawn from it, **constant_data** its probabilities and entropies.

    Args:
        source: A `Defense`, a list of independently fitted ones, a `Report` or a `Prediction`.
        data: ``(x, y)``: inputs ``(batch, *event)`` and labels; for a prediction the data it is of.
        num_samples: Draws per chain.
        adversarial: Attacked inputs by radius in pixels, each like `x`.
        weights: Whether every random weight is kept besides.
        seed: Of the draws.
        coords: Of a defense, coordinates by axis, for example ``{"example": file_names}``.
        dims: Of a defense, names of the axes of a variable behind ``(chain, draw)``, such as
            ``{"head.weight": ["class", "feature"]}``; by default ``head.weight_dim_0`` and so on.
        class_names: Coordinates of the axis ``class``.

    Returns:
        The container; ``to_netcdf`` writes it. Its attributes name library, version, seed, defense and rule.

    Raises:
        TypeError: another kind of source, or no data for a defense.
        ValueError: fits with different variables, weights that would not fit in memory, or coordinates and
            names of axes that do not fit the variables.

    References:
        Kumar et al., 2019, [ArviZ, a unified library for exploratory analysis of Bayesian models in
        Python](https://doi.org/10.21105/joss.01143)

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.defenses.rse(pd.models.small_cnn())
        >>> tree = to_arviz(defense, (torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])), num_samples=4)
        >>> tree["constant_data"]["noise_scale"].values.round(3), tree["posterior"]["noise_rms"].shape
        (array([0.2, 0.1], dtype=float32), (1, 4, 2))
    """
    num_samples, seed = check_count("num_samples", num_samples), check_seed(seed)
    if isinstance(source, Report):
        return _of_report(source, num_samples, seed)
    if isinstance(source, Prediction):
        return _of_prediction(source, None if data is None else data[1], num_samples, seed)
    fits = list(source) if isinstance(source, Sequence) else [source]
    bridged = isinstance(source, _bridges())
    if not bridged and (not fits or not all(isinstance(fit, Defense) for fit in fits)):
        raise TypeError(
            f"expected a Defense, a list of them, a Report or a Prediction, got {type(source).__name__}; "
            "wrap a plain network with probdefense.deterministic(net)"
        )
    if data is None:
        raise TypeError(
            "expected data=(x, y), got none; a defense needs data=(x, y), where its predictive and its "
            "log-likelihood are taken"
        )
    data = check_examples(data)
    adversarial = {} if adversarial is None else adversarial
    check_kind("adversarial", adversarial, Mapping, "give attacked inputs by radius, as in {0.1: x_adv}")
    attacked = {eps: _attacked(points, data[0]) for eps, points in adversarial.items()}
    if bridged:
        from probdefense.analysis.bridged import of_bridge

        return of_bridge(source, data, num_samples, attacked, weights, seed)
    own = dict(coords or {}) | ({} if class_names is None else {"class": class_names})
    check_kind("dims", dims or {}, Mapping, "give names of axes by variable, as in {'weight': ['class']}")
    axes = {name: [*several] for name, several in (dims or {}).items()}
    return _of_fits(fits, data, num_samples, attacked, weights, seed, {n: [*v] for n, v in own.items()}, axes)


def _bridges() -> tuple[type, ...]:
    """The class of JAX posteriors, if one can have been made: looking must not import JAX."""
    module = sys.modules.get("probdefense.numpyro.bridge")
    return () if module is None else (module.Bridge,)


def _attacked(points: Any, x: Inputs) -> Inputs:
    points = check_like(points, x, "adversarial inputs")
    if len(points) != len(x):
        raise ValueError(
            f"expected adversarial inputs of the {len(x)} examples, got {len(points)}; attack all of them"
        )
    return points


def from_groups(
    groups: Groups,
    *,
    coords: Mapping[str, Any],
    dims: Mapping[str, list[str]],
    pred_dims: Mapping[str, list[str]] | None = None,
) -> Any:
    """``arviz.from_dict`` under either of its two signatures; `pred_dims` are for the predictions."""
    import arviz

    from_dict: Any = arviz.from_dict
    named: dict[str, Any] = {"coords": coords, "dims": dims, "pred_dims": pred_dims, "pred_coords": coords}
    known = inspect.signature(from_dict).parameters
    if "data" in known:
        return from_dict(groups, **named)
    tree = from_dict(**{name: values for name, values in groups.items() if name in known}, **named)
    for name in groups.keys() - known:  # which 0.23 reads, and does not make
        tree.add_groups({name: groups[name]}, coords=coords, dims=dims)
    return tree


def _of_fits(
    defenses: list[Defense],
    data: tuple[Inputs, Labels],
    num_samples: int,
    adversarial: Mapping[float, Inputs],
    weights: bool,
    seed: int,
    coords: dict[str, list[Any]],
    dims: dict[str, list[str]],
) -> Any:
    sampled = any(chains_of(defense) > 1 for defense in defenses)
    defenses = [chain for defense in defenses for chain in in_chains(defense)]
    (x, y), seeds = data, [derive(seed, "to_arviz", chain) for chain in range(len(defenses))]
    pairs = zip(defenses, seeds, strict=True)
    fits = [read_fit(defense, x, num_samples, adversarial, weights, s) for defense, s in pairs]
    log_probs = torch.stack([fit.drawn.log_probs for fit in fits])
    check_classes(y, log_probs.shape[-1])
    groups: Groups = {
        "posterior_predictive": _predictive(log_probs, derive(seed, "labels")),
        "log_likelihood": {"y": _at_labels(log_probs, y).numpy()},
        "observed_data": {"y": y.cpu().numpy()},
        "constant_data": {"x": x.detach().cpu().numpy()},
    }
    priors = [fit.prior for fit in fits if fit.prior is not None]
    if priors:
        of_prior = torch.stack([prior.log_probs for prior in priors])
        groups["prior_predictive"] = _predictive(of_prior, derive(seed, "prior labels"))
    if adversarial:
        attacked = torch.stack([torch.stack(fit.attacked, dim=1) for fit in fits])
        groups["predictions"] = {"probs": attacked.exp().float().numpy()}
    sizes: dict[str, Any] = {"example": np.arange(len(y)), "class": np.arange(log_probs.shape[-1])}
    sizes |= {"eps": [float(radius) for radius in adversarial]} if adversarial else {}
    axes, fixed = {"y": ["example"], "x": ["example"], "probs": ["example", "class"]}, constants(fits)
    groups["constant_data"] |= fixed.values
    named = Named(groups, axes | fixed.dims, sizes | fixed.coords)  # type: ignore[arg-type]
    pred_dims = {"probs": ["eps", "example", "class"]}
    parts = [_tree(groups, named, coords, pred_dims)]
    parts += _of_draws(fits, y, coords, dims)  # apart, since a latent may have the name of anything else
    tree = parts[0]
    for part in parts[1:]:
        tree = _joined(part, tree)
    tree["log_likelihood"].attrs["weights_are_random"] = int(any(fit.fitted for fit in fits))
    tree["posterior_predictive"].attrs["chains"] = _what_chains_are(len(fits), sampled)
    return _signed(tree, defenses[0], seed)


def _of_draws(
    fits: list[Fit], y: Labels, coords: dict[str, list[Any]], dims: dict[str, list[str]]
) -> list[Any]:
    """Containers of the groups ``posterior``, ``prior`` and ``log_prior``."""
    scores = [_at_labels(fit.drawn.log_probs, y) for fit in fits]
    found = {"posterior": random([fit.drawn for fit in fits], scores)}
    if priors := [fit.prior for fit in fits if fit.prior is not None]:
        found["prior"] = random(priors, [_at_labels(prior.log_probs, y) for prior in priors])
    if unknown := dims.keys() - found["posterior"].values.keys():
        known = ", ".join(found["posterior"].values)
        raise ValueError(
            f"expected dims of variables of the posterior, got {sorted(unknown)}; known: {known}"
        )
    parts = []
    for name, named in found.items():
        for variable, axes in dims.items():
            known_values = named.values.get(variable)
            if known_values is not None and known_values.ndim - 2 != len(axes):
                raise ValueError(
                    f"expected {known_values.ndim - 2} names for the axes of {variable!r}, shape "
                    f"{known_values.shape[2:]}, got {axes}; name every axis behind (chain, draw)"
                )
            named.dims |= {variable: axes} if known_values is not None else {}
        parts.append(_tree({name: named.values}, named, coords))
    if densities := fits[0].log_prior:
        values = {n: np.stack([fit.log_prior[n].numpy() for fit in fits]) for n in densities}
        parts.append(from_groups({"log_prior": values}, coords={}, dims={}))
    return parts


def _tree(
    groups: Groups,
    named: Named,
    coords: dict[str, list[Any]],
    pred_dims: Mapping[str, list[str]] | None = None,
) -> Any:
    """A container with the coordinates of the caller where they fit.

    Raises:
        ValueError: they do not.
    """
    sizes = {axis: len(values) for axis, values in named.coords.items()}
    for group, variables in groups.items():
        leading = 0 if group in ("observed_data", "constant_data") else 2
        for name, values in variables.items():
            axes = (pred_dims if group == "predictions" and pred_dims else named.dims).get(name, [])
            sizes |= dict(zip(axes, values.shape[leading:], strict=False))
    for axis in coords.keys() & sizes:
        if len(coords[axis]) != sizes[axis]:
            raise ValueError(
                f"expected {sizes[axis]} coordinates of the axis {axis!r}, got {len(coords[axis])}; give one "
                "each"
            )
    own = {axis: values for axis, values in coords.items() if axis in sizes}
    return from_groups(groups, coords=named.coords | own, dims=named.dims, pred_dims=pred_dims)


def _predictive(log_probs: Tensor, seed: int) -> dict[str, np.ndarray]:
    """Probabilities and a sampled label of every draw."""
    with forked(seed):
        labels = torch.distributions.Categorical(logits=log_probs, validate_args=False).sample()
    return {"probs": log_probs.exp().float().numpy(), "y": labels.numpy()}


def _at_labels(log_probs: Tensor, y: Labels) -> Tensor:
    """Log-probability of the true class, ``(..., batch)``."""
    return log_probs.gather(-1, y.cpu().expand(log_probs.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def _signed(tree: Any, defense: Defense, seed: int) -> Any:
    """The container with what made it as attributes, of itself and of its groups of draws."""
    about = {
        "library": "probdefense",
        "version": probdefense.__version__,
        "seed": seed,
        "defense": " of ".join(
            [*(c.builder for c in reversed(defense.calls or ())), type(defense.net).__name__]
        ),
        "rule": "mean_prob",
    }
    for place in (tree, *(tree[name] for name in groups_of(tree) & {*DRAWN})):
        place.attrs.update(about)
    return tree


def _joined(tree: Any, other: Any) -> Any:
    """One container with the groups of both."""
    if hasattr(tree, "extend"):
        tree.extend(other)
    else:
        tree.update(dict(other.children))
    return tree


def _what_chains_are(count: int, sampled: bool) -> str:
    if sampled:
        return f"{count} chains of given samples, in their order: R-hat and ESS compare them"
    if count == 1:
        return "one fit: its draws are independent, so R-hat and ESS say nothing about convergence"
    return f"{count} independent fits: R-hat, best read on the log-likelihood, compares them"


def _of_prediction(prediction: Prediction, y: Labels | None, num_samples: int, seed: int) -> Any:
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
    return from_groups(
        groups,
        coords={"example": np.arange(batch), "class": np.arange(classes)},
        dims={name: ["example"] for name in ("y", "num_samples", *constants)}
        | {"probs": ["example", "class"]},
    )


def _of_report(report: Report, num_samples: int, seed: int) -> Any:
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
    tree = from_groups(
        groups,
        coords={"row": labels, "example": np.arange(sizes.pop())},
        dims={name: ["row"] for name in ("accuracy", *about)} | {"correct": ["row", "example"]},
    )
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
