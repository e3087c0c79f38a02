"""What is random in a defense: one kind of site per file."""

from probdefense.core.sites.members import MemberSite
from probdefense.core.sites.noise import NoiseSite, layer_name, noise_sites
from probdefense.core.sites.samples import SampleSite
from probdefense.core.sites.scales import ScaleSite
from probdefense.core.sites.site import Site, join, unique_names, unused
from probdefense.core.sites.weight_noise import WeightNoiseSite
from probdefense.core.sites.weights import Family, Prior, WeightSite, Where, flat_weights, removed, tied_names

__all__ = [
    "Family",
    "MemberSite",
    "NoiseSite",
    "Prior",
    "SampleSite",
    "ScaleSite",
    "Site",
    "WeightNoiseSite",
    "WeightSite",
    "Where",
    "flat_weights",
    "join",
    "layer_name",
    "noise_sites",
    "removed",
    "tied_names",
    "unique_names",
    "unused",
]
