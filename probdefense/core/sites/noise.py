"""Noise on activations: a hole of a layer, filled anew for every example."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from probdefense.core.families import Fixed
from probdefense.core.sites.site import Site
from probdefense.nn.placeholder import placeholders


@dataclass(frozen=True, eq=False)
class NoiseSite(Site):
    """The hole of a layer, filled anew for every example (and every use, if the layer is reused)."""

    path: str = ""

    local = True


def noise_sites(net: nn.Module, sites: Iterable[Site] = ()) -> list[Site]:
    """A site with no posterior of its own for every hole of `net` that no given site fills."""
    covered = {site.path for site in sites if isinstance(site, NoiseSite)}
    return [
        NoiseSite(layer_name(path), prior=Fixed(hole.family).to(hole.value), posterior=None, path=path)
        for path, hole in placeholders(net).items()
        if path not in covered
    ]


def layer_name(path: str) -> str:
    """The name of the layer that owns a hole: ``conv1.noise.eps -> conv1.noise``."""
    return path.rpartition(".")[0] or path
