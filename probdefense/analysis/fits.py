"""What a fitted defense knows, as named arrays ``(chain, draw, ...)``: no plotting, no ArviZ."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probdefense.analysis.chains import lengths
from probdefense.core.defense import Defense
from probdefense.core.programs import Model, data_plate, sample_sites, vector
from probdefense.core.replayed import FrozenReplay, Replayed
from probdefense.core.sites import (
    MemberSite,
    NoiseSite,
    ScaleSite,
    WeightSite,
    layer_name,
    unused,
)
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


class Drawn(NamedTuple):
    """Random values: those of a draw ``(draws, ...)`` by name, and a number per layer that varies by draw.

    ``by_draw`` holds, by quantity and layer, ``(draws,)``: ``noise_rms``, the root mean square of what a
    layer adds to one example, and ``weight_rms``, that of a random parameter.
    """

    values: dict[str, Tensor]
    by_draw: dict[str, dict[str, Tensor]]
    log_probs: Tensor


class Fit(NamedTuple):
    """What one defense contributes.

    ``by_layer`` numbers that belong to the fit and not to a draw, by quantity and layer; ``elements``
    the same per element; ``drawn`` from the guide, ``prior`` from the model where every site has one;
    ``log_prior`` by site ``(draws,)`` at the guide's draws; ``attacked`` as ``log_probs`` ``(draws, batch,
    classes)`` for every radius; ``fitted`` whether anything that is drawn once for all examples was
    fitted to data (noise was not).
    """

    by_layer: dict[str, dict[str, float]]
    elements: dict[str, Tensor]
    drawn: Drawn
    prior: Drawn | None
    log_prior: dict[str, Tensor]
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
        frozen = defense.freeze(min([num_samples, *lengths(defense)]))
        sites, local = drawn_sites(frozen, x)
        draws = _named(defense, sites)
        log_probs = _log_probs(frozen, x)
        attacked = [_log_probs(frozen, points) for points in adversarial.values()]
        by_layer = _by_layer(defense, {n: v for n, v in draws.items() if n not in _members(defense)})
        own = frozen.engine if isinstance(frozen, FrozenReplay) else None
        hyper = own.hyper_parameters(x) & draws.keys() if own else _others(defense)
        fitted = any(own.global_sites(x).values()) if own else _fitted(defense)
        prior = _of_prior(defense, x, len(log_probs), derive(seed, "prior"))
        densities = log_prior(defense, x, sites)
        by_draw = _by_draw(defense, draws, local)
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
    if prior is not None:
        prior = prior._replace(values={name: value for name, value in prior.values.items() if name in kept})
    return Fit(by_layer, elements, Drawn(kept, by_draw, log_probs), prior, densities, attacked, fitted)


AXES = {"noise_scale": "noise_layer", "noise_rms": "noise_layer", "prior_scale": "prior_parameter"}
"""The axis of a quantity; ``parameter`` for all others."""


def random(drawn: Sequence[Drawn], scores: Sequence[Tensor]) -> Named:
    """What varies by draw, ``(chain, draw, ...)``; where nothing does, the mean log-likelihood alone.

    Args:
        drawn: By fit.
        scores: By fit, the log-likelihoods ``(draws, batch)``.

    Raises:
        ValueError: fits whose variables differ.
    """
    first, named = drawn[0], Named()
    kinds = {(tuple(each.values), *((q, *layers) for q, layers in each.by_draw.items())) for each in drawn}
    if len(kinds) > 1:
        raise ValueError("expected fits of one kind of defense as chains, got different random variables")
    taken = {"chain", "draw", *first.values}  # what the user named keeps its name, and ours give way
    for quantity, by_layer in first.by_draw.items():
        layers = [layer for layer in by_layer if _varies([each.by_draw[quantity][layer] for each in drawn])]
        if layers:
            name, axis = unused(quantity, taken), unused(AXES.get(quantity, "parameter"), taken)
            named.dims[name], named.coords[axis] = [axis], layers
            values = [np.stack([e.by_draw[quantity][n].numpy() for n in layers], axis=-1) for e in drawn]
            named.values[name] = np.stack(values)
    for site, value in first.values.items():
        if not _varies([each.values[site] for each in drawn]):
            continue
        name = unused(site, taken) if site in ("chain", "draw") else site
        named.dims[name] = [unused(f"{name}_dim_{axis}", taken) for axis in range(value.dim() - 1)]
        named.values[name] = np.stack([each.values[site].numpy() for each in drawn])
    if not named.values:
        named.values["mean_log_likelihood"] = np.stack([score.mean(-1).numpy() for score in scores])
    return named


def _varies(chains: list[Tensor]) -> bool:
    """Whether draws differ, or there is but one."""
    return all(len(chain) == 1 for chain in chains) or any(bool((c != c[:1]).any()) for c in chains)


def constants(fits: Sequence[Fit]) -> Named:
    """What belongs to a fit and to no draw; an axis of chains comes first where there are several fits.

    Raises:
        ValueError: fits whose layers differ.
    """
    first, named = fits[0], Named()
    if len({(tuple(fit.by_layer), tuple(fit.elements)) for fit in fits}) > 1:
        raise ValueError("expected fits of one kind of defense as chains, got different random variables")
    chains = ["chain"] if len(fits) > 1 else []
    for quantity, layers in first.by_layer.items():
        axis = AXES.get(quantity, "parameter")
        named.dims[quantity], named.coords[axis] = [*chains, axis], list(layers)
        values = [np.array(list(fit.by_layer[quantity].values()), dtype=np.float32) for fit in fits]
        named.values[quantity] = np.stack(values) if chains else values[0]
    for element, value in first.elements.items():
        named.dims[element] = [*chains, *(f"{element}_dim_{axis}" for axis in range(value.dim()))]
        values = [fit.elements[element].numpy() for fit in fits]
        named.values[element] = np.stack(values) if chains else values[0]
    if chains:
        named.coords["chain"] = list(range(len(fits)))
    return named


def _log_probs(frozen: LogitsFn, x: Inputs) -> Tensor:
    """In float64: in float32 a confident draw has log-likelihood 0, which has no tail to smooth."""
    return frozen(x).cpu().double().log_softmax(-1)


def drawn_sites(frozen: Any, x: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values of the sites of a frozen defense, ``(draws, ...)``: those of a draw, then of one example."""
    if isinstance(frozen, FrozenReplay):
        members = frozen.values(x)
        axes = {name: axis for name, (_, axis) in members[0].items()}
        stacked = {name: torch.stack([member[name][0].cpu() for member in members]) for name in axes}
        local = {name: value for name, value in stacked.items() if axes[name] is not None}
        return {name: value for name, value in stacked.items() if name not in local}, local
    names = [site.name for site in frozen.engine.model.global_sites]
    noise = [frozen.stream.noise(x[:1], range(k, k + 1), range(1)) for k in range(frozen.num_samples)]
    of_one = {name: torch.cat([each[name] for each in noise]).cpu() for name in noise[0]} if noise else {}
    return {name: frozen.values(name) for name in names}, of_one


def _named(defense: Defense, sites: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values of sites as those of parameters, by name, ``(draws, ...)``."""
    if not defense.sites:
        return sites
    draws: dict[str, Tensor] = {}
    for name in _others(defense):
        value = sites[name].cpu()
        draws[name] = value.squeeze(-1) if value.shape[1:] == (1,) else value
    weights = [site for site in defense.sites.values() if isinstance(site, WeightSite)]
    for site in sorted(weights, key=lambda site: site.perturbs):
        filled = [
            site.fill(value, defense.net, {n: v[i] for n, v in draws.items()})
            for i, value in enumerate(sites[site.name])
        ]
        draws |= {names[0]: torch.stack([f[names[0]] for f in filled]).cpu() for names in site.names}
    for site in weights:
        draws |= {name: draws[name][:, rows] for name, rows in site.random_rows(defense.net).items()}
    return draws


def _by_draw(
    defense: Defense, draws: dict[str, Tensor], local: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """One number per layer and draw: the root mean square of its noise, and of every random parameter."""
    skipped = _members(defense)
    quantities = {
        "noise_rms": {name: _rms_by_draw(v) * _coefficient(defense, name) for name, v in local.items()},
        "weight_rms": {name: _rms_by_draw(v) for name, v in draws.items() if name not in skipped},
    }
    return {name: values for name, values in quantities.items() if values}


def _rms_by_draw(values: Tensor) -> Tensor:
    return values.double().flatten(1).square().mean(1).sqrt() if values.dim() > 1 else values.double().abs()


def _coefficient(defense: Defense, use: str) -> float:
    """The scale of the layer whose standard noise it is; 1 where there is none."""
    site = defense.sites.get(use, defense.sites.get(use.rpartition(".")[0]))
    if not isinstance(site, NoiseSite):
        return 1.0
    layer = defense.net.get_submodule(layer_name(site.path))
    scale = getattr(layer, "scale", getattr(layer, "alpha", None))
    return _rms(scale) if isinstance(scale, Tensor) else 1.0


class Nothing(torch.nn.Module):
    """A guide that draws nothing, so that every site comes from the model."""

    def forward(self, x: Inputs, y: Any = None) -> None:
        """Does nothing."""


def _of_prior(defense: Defense, x: Inputs, num_samples: int, seed: int) -> Drawn | None:
    """The defense with every site drawn from its prior; None where a site has none."""
    if any(site.prior is None for site in defense.sites.values()):
        return None
    if isinstance(defense.model, Model):
        sites, local, log_probs = _of_our_prior(defense.model, x, num_samples, seed)
    else:
        frozen = Replayed(defense.model, Nothing()).freeze(num_samples, seed)
        (sites, local), log_probs = drawn_sites(frozen, x), _log_probs(frozen, x)
    draws = _named(defense, sites)
    return Drawn(draws, _by_draw(defense, draws, local), log_probs)


def _of_our_prior(
    model: Model, x: Inputs, num_samples: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Values of a draw, those of one example, and log-probabilities with noise that the batch shares."""
    members, answers, local = [], [], [use.name for use in model.uses(x)]
    for member in range(num_samples):
        with forked(derive(seed, member), x.device):
            values = sample_sites(model, x[:1], "prior", data_plate(model, x[:1]))
        members.append(values)
        shared = {name: values[name].expand(len(x), *values[name].shape[1:]) for name in local}
        answers.append(model.logits(x, values | shared).cpu().double().log_softmax(-1))
    stacked = {name: torch.stack([values[name] for values in members]) for name in members[0]}
    of_one = {name: stacked.pop(name)[:, 0].cpu() for name in local}
    return stacked, of_one, torch.stack(answers)


def log_prior(defense: Defense, x: Inputs, sites: dict[str, Tensor]) -> dict[str, Tensor]:
    """Log density of the prior of every fitted site at the guide's draws, nats, ``(draws,)``."""
    if not defense.sites and sites:
        engine, found = Replayed(defense.model, defense.guide), []
        fitted = [name for name, known in engine.global_sites(x).items() if known]
        for member in range(len(next(iter(sites.values())))):
            given = {name: sites[name][member].to(x.device) for name in fitted}
            densities = engine.log_prior(x[:1], given)
            found.append({name: densities[name] for name in fitted})
        return {name: torch.stack([each[name] for each in found]).double().cpu() for name in fitted}
    found_sites: dict[str, Tensor] = {}
    for site in defense.sites.values():
        known = site.prior is not None and site.posterior is not None
        if known and not site.local and not isinstance(site, MemberSite):
            values = sites[site.name]
            of_draw = [{n: v[k] for n, v in sites.items()} for k in range(len(values))]
            each = [vector(site, "prior", g).log_prob(v) for g, v in zip(of_draw, values, strict=True)]
            found_sites[site.name] = torch.stack(each).double().cpu()
    return found_sites


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


def _others(defense: Defense) -> set[str]:
    """Sites of a draw that are no weights: scales of priors, choices of a member."""
    sites = defense.sites.values()
    return {site.name for site in sites if not site.local and not isinstance(site, WeightSite)}


def _members(defense: Defense) -> set[str]:
    """Sites that choose a member."""
    sites = defense.sites.values()
    return {s.name for s in sites if isinstance(s, MemberSite) and not isinstance(s, WeightSite)}


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
