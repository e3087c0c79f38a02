"""The noise on the raw input that a certificate may count on, and the noise that a site really is."""

from collections.abc import Iterable

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from probdefense.core.sites import NoiseSite, Site, WeightSite, layer_name
from probdefense.nn.correlated_noise import CorrelatedNoise
from probdefense.nn.noise import Noise
from probdefense.nn.surgery import reads_raw_input
from probdefense.ops import rounded_down


def noise_layer(net: nn.Module, site: Site) -> Noise | None:
    """The `Noise` layer that a site fills, if it fills one."""
    layer = net.get_submodule(layer_name(site.path)) if isinstance(site, NoiseSite) else None
    return layer if isinstance(layer, Noise) else None


def deviation(layer: Noise, drawn: Distribution) -> Tensor | None:
    r"""The standard deviation of the noise that a layer adds, $\sigma\, \mathrm{std}(\varepsilon)$.

    None where the scale of the layer is random itself.
    """
    return None if has_random_parameters(layer) else (layer.scale * drawn.stddev).detach()


def has_random_parameters(layer: nn.Module) -> bool:
    """Whether a parameter of the layer has become a random site, and is no longer in it."""
    return any(parameter is None for parameter in layer._parameters.values())


def input_noise(net: nn.Module, sites: Iterable[Site]) -> tuple[str, Tensor] | None:
    r"""Family and scale (in pixels, rounded down) of the noise on the raw input, or None.

    ``"normal"`` with $\sigma$, ``"laplace"`` with $\lambda$, or ``"uniform"`` on $[-\lambda, \lambda]$.
    Only a layer that everything else in the network sees the input through counts, with independent
    noise around zero whose scale is neither random nor a function of the input.
    """
    sites = list(sites)
    for site in sites:
        layer = noise_layer(net, site)
        if layer is None or not reads_raw_input(net, layer):
            continue
        standard = _standard(site.distribution("posterior"))
        if standard is None or not _acts_additively(layer) or _is_perturbed(site, sites):
            continue
        family, width = standard
        if type(layer) is Noise and layer.eps.axes is None:
            scale = layer.scale
        elif type(layer) is CorrelatedNoise and family == "normal":
            scale = torch.linalg.svdvals(layer.mixing.detach().cpu().double())
        else:
            continue
        exact = scale.detach().cpu().double() * width.detach().cpu().double()
        return family, rounded_down(exact, layer.eps.value.dtype).to(layer.eps.value.device)
    return None


def _standard(drawn: Distribution) -> tuple[str, Tensor] | None:
    """Family and scale of the latent, if it is of a family with a certificate and around zero."""
    if type(drawn) in (dist.Normal, torch.distributions.Normal) and not drawn.mean.any():
        return "normal", drawn.scale  # type: ignore[attr-defined]
    if type(drawn) in (dist.Laplace, torch.distributions.Laplace) and not drawn.mean.any():
        return "laplace", drawn.scale  # type: ignore[attr-defined]
    if type(drawn) in (dist.Uniform, torch.distributions.Uniform) and bool((drawn.low == -drawn.high).all()):  # type: ignore[attr-defined]
        return "uniform", drawn.high  # type: ignore[attr-defined]
    return None


def _is_perturbed(site: Site, sites: list[Site]) -> bool:
    """Whether another site makes or moves a parameter of the layer, so that its scale is random."""
    within = f"{layer_name(getattr(site, 'path', ''))}."
    filled = [
        name for other in sites if isinstance(other, WeightSite) for names in other.names for name in names
    ]
    return any(name.startswith(within) for name in filled)


def _acts_additively(layer: Noise) -> bool:
    """Whether the noise is added, and not in training only."""
    return not (layer.multiplicative or layer.when == "train" or (layer.when == "test" and layer.training))
