"""A JAX posterior as an ArviZ container: its draws by chain, in their order."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probdefense.analysis.arviz import Groups, _at_labels, _predictive, from_groups
from probdefense.analysis.fits import LAST_LAYER
from probdefense.rng import derive
from probdefense.types import Inputs, Labels
from probdefense.validation import check_classes


def of_bridge(
    source: Any,
    data: tuple[Inputs, Labels],
    num_samples: int,
    adversarial: Mapping[float, Inputs],
    weights: bool,
    seed: int,
) -> Any:
    """The container of a `Bridge`: at most `num_samples` draws of each chain, evenly spaced."""
    x, y = data
    source(x[:1])  # whether draws are grouped by chain shows with inputs
    chains, length = source.num_chains, source.num_draws // source.num_chains
    places = np.linspace(0, length - 1, min(num_samples, length)).round().astype(int)
    chosen = torch.as_tensor(np.arange(chains)[:, None] * length + places)
    frozen = type(source)(source.network, chosen.flatten())

    def log_probs(points: Inputs) -> Tensor:
        with torch.no_grad():
            return frozen(points).cpu().double().log_softmax(-1).unflatten(0, chosen.shape)

    clean = log_probs(x)
    check_classes(y, clean.shape[-1])
    groups: Groups = {
        "posterior": _draws(source, chosen, weights),
        "posterior_predictive": _predictive(clean, derive(seed, "labels")),
        "log_likelihood": {"y": _at_labels(clean, y).numpy()},
        "observed_data": {"y": y.cpu().numpy()},
        "constant_data": {"x": x.detach().cpu().numpy()},
    }
    if adversarial:
        attacked = torch.stack([log_probs(points) for points in adversarial.values()], dim=2)
        groups["predictions"] = {"probs": attacked.exp().float().numpy()}
    sizes = {"example": np.arange(len(y)), "class": np.arange(clean.shape[-1])}
    tree = from_groups(
        groups,
        coords=sizes | ({"eps": [float(radius) for radius in adversarial]} if adversarial else {}),
        dims={"y": ["example"], "x": ["example"], "probs": ["example", "class"]},
        pred_dims={"probs": ["eps", "example", "class"]},
    )
    tree["log_likelihood"].attrs["weights_are_random"] = 1
    tree["posterior_predictive"].attrs["chains"] = f"{chains} chains of given draws, in their order"
    return tree


def _draws(source: Any, chosen: Tensor, weights: bool) -> dict[str, np.ndarray]:
    """The leaves of the draws by path, ``(chain, draw, ...)``; without `weights` those that are small."""
    import jax

    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(source.network.draws):
        keys = [str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path]
        if weights or leaf[0].size <= LAST_LAYER:
            found[".".join(keys) or "draws"] = np.asarray(leaf)[chosen.numpy()]
    return found
