"""The noise on the raw input that a certificate may count on, and the noise that a site really is."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from probdefense.core.sites import NoiseSite, Site, layer_name
from probdefense.nn.noise import Noise
from probdefense.nn.surgery import reads_raw_input


def noise_layer(net: nn.Module, site: Site) -> Noise | None:
    """The `Noise` layer that a site fills, if it fills one."""
    layer = net.get_submodule(layer_name(site.path)) if isinstance(site, NoiseSite) else None
    return layer if isinstance(layer, Noise) else None


def deviation(layer: Noise, drawn: Distribution) -> Tensor:
    r"""The standard deviation of the noise that a layer adds, $\sigma\, \mathrm{std}(\varepsilon)$."""
    return (layer.scale * drawn.stddev).detach()


def input_noise(net: nn.Module, sites: Iterable[Site]) -> tuple[str, Tensor] | None:
    """Family and standard deviation (in pixels) of centered normal noise on the raw input, or None.

    Only a layer that everything else in the network sees the input through counts, and only normal noise
    around zero: no certificate of ours holds for another.
    """
    for site in sites:
        layer = noise_layer(net, site)
        if layer is None or not reads_raw_input(net, layer):
            continue
        drawn = site.distribution("posterior")
        if _acts_additively(layer) and isinstance(drawn, torch.distributions.Normal) and not drawn.loc.any():
            return "normal", deviation(layer, drawn)
    return None


def _acts_additively(layer: Noise) -> bool:
    """Whether the noise is added, and not in training only."""
    return not (layer.multiplicative or layer.when == "train" or (layer.when == "test" and layer.training))
