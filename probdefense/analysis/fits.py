"""What a fitted defense knows, as named arrays ``(chain, draw, ...)``: no plotting, no ArviZ."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probdefense.core.defense import Defense
from probdefense.core.programs import vector
from probdefense.core.replayed import FrozenReplay
from probdefense.core.sites import NoiseSite, SampleSite, ScaleSite, Site, WeightSite, layer_name, unused
from probdefense.rng import derive, forked
from probdefense.types import Inputs, LogitsFn

SMALL = 1_000
"""Noise scales of a layer up to this number are also kept one by one."""

LAST_LAYER = 10_000
"""A last layer with more elements is left out unless all weights are asked for."""

MAX_VALUES = 50_000_000
"""How many numbers the weights of one fit may be (200 MB)."""


@dataclass
class Named:
    """Variables by name, the names of their axes behind ``(chain, draw)``, and the coordinates."""

    values: dict[str, np.ndarray] = field(default_factory=dict)
    dims: dict[str, list[str]] = field(default_factory=dict)
    coords: dict[str, Any] = field(default_factory=dict)


class Fit(NamedTuple):
    """What one defense contributes.

    ``by_layer`` numbers that belong to the fit and not to a draw, by quantity and layer; ``elements``
    the same per element; ``draws`` random tensors ``(draws, ...)``; ``log_probs`` ``(draws, batch,
    classes)``; ``attacked`` the same for every radius; ``fitted`` whether anything that is drawn once
    for all examples was fitted to data (noise was not).
    """

    by_layer: dict[str, dict[str, float]]
    elements: dict[str, Tensor]
    draws: dict[str, Tensor]
    log_probs: Tensor
    attacked: list[Tensor]
    fitted: bool


def noise_scales(defense: Defense) -> dict[str, Tensor]:
    r"""The scale $\sigma$ of every noise, by site, in the units of what it is added to, detached.

    With a variational posterior it is the layer's scale times the posterior's; noise on weights has
    one scale per weight; noise relative to what it is added to has its coefficient.

    Examples:
        >>> import probdefense as pd
        >>> noise_scales(pd.defenses.rse(pd.models.small_cnn()))
        {'input_noise': tensor(0.2000), '2.noise': tensor(0.1000)}
    """
    scales: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}
    for site in sorted(defense.sites.values(), key=lambda site: site.perturbs):
        if isinstance(site, NoiseSite):
            layer = defense.net.get_submodule(layer_name(site.path))
            scale = getattr(layer, "scale", getattr(layer, "alpha", None))
            if isinstance(scale, Tensor):
                spread = 1.0 if site.posterior is None else site.posterior().scale
                scales[site.name] = (scale * spread).detach()
        elif isinstance(site, WeightSite) and not site.perturbs:
            means |= site.fill(site.center(), defense.net)
        elif isinstance(site, WeightSite):
            zeros = site.center()
            noisy, plain = (site.fill(eps, defense.net, means) for eps in (zeros + 1, zeros))
            scales |= {names[0]: (noisy[names[0]] - plain[names[0]]).detach() for names in site.names}
    return scales


def chains_of(defense: Defense) -> int:
    """Of how many chains the samples of a defense are; 0 if it is not made of samples."""
    tables = [site.table for site in defense.sites.values() if isinstance(site, SampleSite)]
    return max((table.chains for table in tables if table is not None), default=0)


def in_chains(defense: Defense) -> list[Defense]:
    """A defense of samples as one per chain, which gives them in their order; any other as it is."""

    def of(site: Site, number: int) -> Site:
        return site.chain(number) if isinstance(site, SampleSite) else site

    count = chains_of(defense)
    chains = [[of(site, number) for site in defense.sites.values()] for number in range(count)]
    return [Defense.from_sites(defense.net, sites, defense.num_data) for sites in chains] or [defense]


def _lengths(defense: Defense) -> list[int]:
    """How many samples each chain has, where there are several chains: their draws are not repeated."""
    sites = [site for site in defense.sites.values() if isinstance(site, SampleSite)]
    return [len(site.order) for site in sites if len(site.order) < site.count]


def read_fit(
    defense: Defense,
    x: Inputs,
    num_samples: int,
    adversarial: Mapping[float, Inputs],
    weights: bool,
    seed: int,
) -> Fit:
    """Draws a defense `num_samples` times, and evaluates those draws on clean and attacked inputs."""
    with torch.no_grad(), forked(derive(seed), x.device):
        frozen = defense.freeze(min([num_samples, *_lengths(defense)]))
        draws = _global_draws(defense, frozen, x)
        log_probs = _log_probs(frozen, x)
        attacked = [_log_probs(frozen, points) for points in adversarial.values()]
        by_layer = _by_layer(defense, draws)
        own = frozen.engine if isinstance(frozen, FrozenReplay) else None
        hyper = own.hyper_parameters(x) & draws.keys() if own else _scales(defense)
        fitted = any(own.global_sites(x).values()) if own else _fitted(defense)
    elements = {
        f"noise_scale.{name}": value.squeeze().cpu()
        for name, value in noise_scales(defense).items()
        if 1 < value.numel() <= SMALL
    }
    kept = draws if weights else _by_default(draws, hyper)
    size = sum(value.numel() for value in kept.values())
    if size > MAX_VALUES:
        raise ValueError(
            f"the weights of {num_samples} draws are {size:,} numbers, more than {MAX_VALUES:,}; "
            "lower num_samples or leave weights=False"
        )
    return Fit(by_layer, elements, kept, log_probs, attacked, fitted)


def posterior(fits: Sequence[Fit]) -> Named:
    """Everything known about the parameters, ``(chain, draw, ...)``; constants repeat along the draws.

    Raises:
        ValueError: fits whose variables differ.
    """
    first, named = fits[0], Named()
    kinds = {(tuple(fit.by_layer), tuple(fit.elements), tuple(fit.draws)) for fit in fits}
    if len(kinds) > 1:
        raise ValueError("expected fits of one kind of defense as chains, got different random variables")
    taken = {"chain", "draw", *first.draws}  # what the user named keeps its name, and ours give way
    axes = {"noise_scale": "noise_layer", "prior_scale": "prior_parameter"}
    for quantity, layers in first.by_layer.items():
        name, axis = unused(quantity, taken), unused(axes.get(quantity, "parameter"), taken)
        named.dims[name], named.coords[axis] = [axis], list(layers)
        values = [np.array(list(fit.by_layer[quantity].values()), dtype=np.float32) for fit in fits]
        named.values[name] = _repeated(values, len(first.log_probs))
    for element in first.elements:
        values = [fit.elements[element].numpy() for fit in fits]
        named.values[unused(element, taken)] = _repeated(values, len(first.log_probs))
    for site, value in first.draws.items():
        name = unused(site, taken) if site in ("chain", "draw") else site
        named.dims[name] = [unused(f"{name}_dim_{axis}", taken) for axis in range(value.dim() - 1)]
        named.values[name] = np.stack([fit.draws[site].numpy() for fit in fits])
    return named


def _repeated(values: list[np.ndarray], num_samples: int) -> np.ndarray:
    """One constant per chain to ``(chain, draw, ...)``."""
    return np.repeat(np.stack(values)[:, None], num_samples, axis=1)


def _log_probs(frozen: LogitsFn, x: Inputs) -> Tensor:
    """In float64: in float32 a confident draw has log-likelihood 0, which has no tail to smooth."""
    return frozen(x).cpu().double().log_softmax(-1)


def _global_draws(defense: Defense, frozen: Any, x: Inputs) -> dict[str, Tensor]:
    """Values of all weights that are random, by name, ``(draws, ...)``."""
    if isinstance(frozen, FrozenReplay):
        members = frozen.values(x)
        names = [name for name, (_, axis) in members[0].items() if axis is None]
        return {name: torch.stack([member[name][0].cpu() for member in members]) for name in names}
    draws: dict[str, Tensor] = {name: frozen.drawn[name].cpu() for name in _scales(defense)}
    sites = [site for site in defense.sites.values() if isinstance(site, WeightSite)]
    for site in sorted(sites, key=lambda site: site.perturbs):
        flat = frozen.drawn[site.name]
        filled = [
            site.fill(value, defense.net, {n: v[i] for n, v in draws.items()}) for i, value in enumerate(flat)
        ]
        draws |= {names[0]: torch.stack([f[names[0]] for f in filled]).cpu() for names in site.names}
    return draws


def _by_layer(defense: Defense, draws: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Noise scales, and for weights the scale, the signal-to-noise ratio and the prior's scale."""
    loc = {name: value.double().mean(0) for name, value in draws.items()}
    scale = {name: value.double().std(0, correction=0) for name, value in draws.items()}
    prior: dict[str, Tensor] = {}
    centers = {site.name: site.center() for site in defense.sites.values() if isinstance(site, ScaleSite)}
    for site in defense.sites.values():
        if isinstance(site, WeightSite) and not site.perturbs:  # exact instead of estimated from draws
            mean, variance = site.moments()
            loc |= site.views(mean)
            scale |= site.views(variance.sqrt())
            with suppress(NotImplementedError):  # a transformed prior may not know its variance
                prior |= {} if site.prior is None else site.views(vector(site, "prior", centers).stddev)
    quantities = {
        "noise_scale": {name: _rms(value) for name, value in noise_scales(defense).items()},
        "weight_scale": {name: _rms(value) for name, value in scale.items()},
        "signal_to_noise": {name: float((loc[name].abs() / scale[name]).median()) for name in scale},
        "prior_scale": {name: _rms(value) for name, value in prior.items()},
    }
    return {name: values for name, values in quantities.items() if values}


def _rms(values: Tensor) -> float:
    return math.sqrt(float(values.double().square().mean()))


def _scales(defense: Defense) -> set[str]:
    """Sites whose values are the scales of priors."""
    return {site.name for site in defense.sites.values() if isinstance(site, ScaleSite)}


def _fitted(defense: Defense) -> bool:
    return any(not site.local and site.posterior is not None for site in defense.sites.values())


def _by_default(draws: dict[str, Tensor], hyper: set[str]) -> dict[str, Tensor]:
    """Hyper-parameters, what priors of others depend on, and the last layer."""
    small = {name for name in hyper if draws[name][0].numel() <= LAST_LAYER}
    last = _last_layer({name: value for name, value in draws.items() if name not in hyper})
    return {name: value for name, value in draws.items() if name in small or name in last}


def _last_layer(draws: dict[str, Tensor]) -> dict[str, Tensor]:
    """The draws of the module that comes last, unless it is large."""
    owner = max(draws, default="", key=list(draws).index).rpartition(".")[0]
    last = {name: value for name, value in draws.items() if name.rpartition(".")[0] == owner}
    return last if sum(value[0].numel() for value in last.values()) <= LAST_LAYER else {}
