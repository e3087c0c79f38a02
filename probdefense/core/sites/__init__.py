"""What is random in a defense."""

from probdefense.core.sites.weights import (
    Family,
    Fixed,
    MemberSite,
    NoiseSite,
    Prior,
    Site,
    WeightNoiseSite,
    WeightSite,
    Where,
    flat_weights,
    join,
    layer_name,
    noise_sites,
    tied_names,
    unique_names,
    unused,
)

__all__ = [
    "Family",
    "Fixed",
    "MemberSite",
    "NoiseSite",
    "Prior",
    "Site",
    "WeightNoiseSite",
    "WeightSite",
    "Where",
    "flat_weights",
    "join",
    "layer_name",
    "noise_sites",
    "tied_names",
    "unique_names",
    "unused",
]
