"""What a defense is, in a few lines: its sites with their families, scales and sizes."""

from typing import Any

from torch import Tensor, nn

from probdefense.core.families import Fixed
from probdefense.core.sites import Site
from probdefense.core.smoothing import deviation, noise_layer
from probdefense.tables import format_table

COLUMNS = ("site", "elements", "prior", "posterior", "scale")


def describe(defense: Any) -> str:
    """The network, the number of trained parameters, and one line per site."""
    count = sum(p.numel() for p in defense.parameters() if p.requires_grad)
    title = (
        f"Defense of {type(defense.net).__name__}, {count:,} trained parameters, num_data={defense.num_data}"
    )
    if not defense.sites:
        known = "nothing is random" if not defense.stochastic else "sites of its own model and guide"
        return f"{title}; {known}"
    rows = [_row(defense.net, site) for site in defense.sites.values()]
    return f"{title}\n{format_table(rows, COLUMNS)}"


def _row(net: nn.Module, site: Site) -> dict[str, str]:
    layer = noise_layer(net, site)
    if layer is None:
        scale = getattr(site.posterior, "scale", None)
    else:
        scale = deviation(layer, site.distribution("posterior"))
    return {
        "site": site.name,
        "elements": "per example" if site.local else f"{site.size:,}",
        "prior": _family(site.prior) if site.prior is not None else "none",
        "posterior": _family(site.posterior) if site.posterior is not None else "the prior",
        "scale": "-" if scale is None else _range(scale),
    }


def _family(module: nn.Module) -> str:
    """The family, with its numbers where they are few and not trained."""
    distribution = module()
    name = type(distribution).__name__
    if not isinstance(module, Fixed):
        return name
    values = [getattr(module, parameter) for parameter in module.names]
    return f"{name}({', '.join(_range(value) for value in values)})"


def _range(values: Tensor) -> str:
    low, high = float(values.detach().min()), float(values.detach().max())
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
