"""What a defense is, in a few lines: its sites with their families, scales and sizes."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from probdefense.core.evidence import data_size, random_sites
from probdefense.core.families import Fixed
from probdefense.core.replayed import Replayed
from probdefense.core.sites import Site
from probdefense.core.smoothing import deviation, noise_layer
from probdefense.rng import forked
from probdefense.tables import format_table, html_table

COLUMNS = ("site", "elements", "prior", "posterior", "scale")

SHAPES = ("Independent", "ExpandedDistribution", "MaskedDistribution")


def describe(defense: Any) -> str:
    """The network, the number of trained parameters, and one line per site."""
    return _described(defense, lambda rows, title: f"{title}\n{format_table(rows, COLUMNS)}")


def describe_as_html(defense: Any) -> str:
    """The same for a notebook."""
    return _described(defense, lambda rows, title: html_table(rows, COLUMNS, title))


def _described(defense: Any, table: Callable[[list[dict[str, str]], str], str]) -> str:
    count, num_data = sum(p.numel() for p in defense.parameters() if p.requires_grad), defense.num_data
    rows, known = [_row(defense.net, site) for site in defense.sites.values()], "nothing is random"
    if not rows and defense.stochastic:
        known = "sites of its own model and guide; they are listed if it is made with example=x"
        if defense._example is not None:
            with suppress(Exception):  # what prints a defense that is half built or moved must not fail
                rows, num_data = _of_a_run(defense._engine, defense._example)
    title = f"Defense of {type(defense.net).__name__}, {count:,} trained parameters, num_data={num_data}"
    if not rows:
        title = f"{title}; {known}"
    return table(rows, title) if rows else title


@torch.no_grad()
def _of_a_run(engine: Replayed, x: Tensor) -> tuple[list[dict[str, str]], int | None]:
    """The latent sites of a pair of one's own, and the size of the data set that its plate states."""
    with forked(0, x.device):
        guide, model = engine.traces(x)
        inside = engine.global_sites(x)
    fitted, rows = random_sites(guide), []
    for name, site in random_sites(model).items():
        posterior = fitted[name]["fn"] if name in fitted else None
        kind, scale = _family_of(site["fn"] if posterior is None else posterior)
        if isinstance(engine.guide, AutoGuide) and posterior is not None:
            kind, scale = type(engine.guide).__name__, "-"  # whose own sites are deltas
        row = {"site": name, "prior": _family_of(site["fn"])[0], "scale": scale}
        row["elements"] = f"{site['value'].numel():,}" if name in inside else "per example"
        rows.append(row | {"posterior": "the prior" if posterior is None else kind})
    return rows, data_size(model, len(x))


def _family_of(distribution: Any) -> tuple[str, str]:
    """The family under what only shapes it, and its scale where it has one."""
    base = distribution
    while hasattr(base, "base_dist") and type(base).__name__ in SHAPES:
        base = base.base_dist
    scale = getattr(base, "scale", None)
    return type(base).__name__, _range(scale) if isinstance(scale, Tensor) else "-"


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
