r"""Defenses, reports and predictions as ArviZ containers, for ArviZ 0.23 and 1.x alike.

Everything carries named axes and starts with ``(chain, draw)``. A chain is one independent fit: draws
of one guide are independent by construction, so agreement between them says nothing about the fit.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch

from probdefense.analysis.chains import chains_of, in_chains
from probdefense.analysis.fits import Named, constants, read_fit
from probdefense.analysis.judged import of_prediction, of_report
from probdefense.analysis.trees import (
    PREDICTIONS,
    Groups,
    Names,
    from_groups,
    of_draws,
    placed,
    predicted,
    predictive,
    whole,
)
from probdefense.core.defense import Defense
from probdefense.evaluation.report import Report
from probdefense.prediction.predictive import Prediction
from probdefense.rng import derive
from probdefense.types import Inputs, Labels
from probdefense.validation import check_count, check_examples, check_kind, check_like, check_seed


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

    Of a posterior by `numpyro.bridge`: the same without priors, at most `num_samples` draws of each chain,
    evenly spaced, with ``weight_rms`` by path in the tree of draws.

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
        coords: Coordinates by axis, for example ``{"example": file_names}``.
        dims: Of a defense, names of the axes of a variable behind ``(chain, draw)``, such as
            ``{"head.weight": ["class", "feature"]}``; by default ``head.weight_dim_0`` and so on.
        class_names: Coordinates of the axis ``class``, which a report does not have.

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
    names = Names.of(coords, dims, class_names)
    if isinstance(source, Report):
        return of_report(source, num_samples, seed, names)
    if isinstance(source, Prediction):
        return of_prediction(source, None if data is None else data[1], num_samples, seed, names)
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

        return of_bridge(source, data, num_samples, attacked, weights, seed, names)
    return _of_fits(fits, data, num_samples, attacked, weights, seed, names)


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


def _of_fits(
    defenses: list[Defense],
    data: tuple[Inputs, Labels],
    num_samples: int,
    adversarial: Mapping[float, Inputs],
    weights: bool,
    seed: int,
    names: Names,
) -> Any:
    sampled = any(chains_of(defense) > 1 for defense in defenses)
    defenses = [chain for defense in defenses for chain in in_chains(defense)]
    seeds = [derive(seed, "to_arviz", chain) for chain in range(len(defenses))]
    pairs = zip(defenses, seeds, strict=True)
    fits = [read_fit(defense, data[0], num_samples, adversarial, weights, s) for defense, s in pairs]
    attacked = {eps: torch.stack([fit.attacked[k] for fit in fits]) for k, eps in enumerate(adversarial)}
    found = predicted(torch.stack([fit.drawn.log_probs for fit in fits]), data, attacked, seed)
    groups, fixed = cast(Groups, found.values), constants(fits)
    groups["constant_data"] |= fixed.values
    drawn = {"posterior": [fit.drawn for fit in fits]}
    if priors := [fit.prior for fit in fits if fit.prior is not None]:
        drawn["prior"] = priors
        of_prior = torch.stack([prior.log_probs for prior in priors])
        groups["prior_predictive"] = predictive(of_prior, derive(seed, "prior labels"))
    named = Named({}, found.dims | fixed.dims, found.coords | fixed.coords)
    parts = [placed(groups, named, names, PREDICTIONS)]
    parts += of_draws(drawn, data[1], names)  # apart, since a latent may have the name of anything else
    if densities := fits[0].log_prior:
        values = {n: np.stack([fit.log_prior[n].numpy() for fit in fits]) for n in densities}
        parts.append(from_groups({"log_prior": values}, coords={}, dims={}))
    made = {"seed": seed, "defense": _name(defenses[0]), "rule": "mean_prob"}
    tree = whole(parts, names, made)
    tree["log_likelihood"].attrs["weights_are_random"] = int(any(fit.fitted for fit in fits))
    tree["posterior_predictive"].attrs["chains"] = _what_chains_are(len(fits), sampled)
    return tree


def _name(defense: Defense) -> str:
    return " of ".join([*(c.builder for c in reversed(defense.calls or ())), type(defense.net).__name__])


def _what_chains_are(count: int, sampled: bool) -> str:
    if sampled:
        return f"{count} chains of given samples, in their order: R-hat and ESS compare them"
    if count == 1:
        return "one fit: its draws are independent, so R-hat and ESS say nothing about convergence"
    return f"{count} independent fits: R-hat, best read on the log-likelihood, compares them"
