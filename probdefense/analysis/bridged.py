"""A JAX posterior as an ArviZ container: its draws by chain, in their order."""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from probdefense.analysis.fits import LAST_LAYER, Drawn, unused
from probdefense.analysis.trees import PREDICTIONS, Groups, Names, of_draws, placed, predicted, whole
from probdefense.types import Inputs, Labels


def of_bridge(
    source: Any,
    data: tuple[Inputs, Labels],
    num_samples: int,
    adversarial: Mapping[float, Inputs],
    weights: bool,
    seed: int,
    names: Names,
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
    found = predicted(clean, data, {eps: log_probs(points) for eps, points in adversarial.items()}, seed)
    leaves = _leaves(source, chosen)
    several = chosen.numel() > 1
    same = {n: v[0, 0].numpy() for n, v in leaves.items() if several and bool((v == v[:1, :1]).all())}
    constant = cast(Groups, found.values)["constant_data"]
    constant |= {unused(name, {*constant}): value for name, value in same.items()}
    parts = [placed(cast(Groups, found.values), found, names, PREDICTIONS)]
    varied = {name: value for name, value in leaves.items() if name not in same}
    parts += of_draws({"posterior": [_drawn(varied, clean, k, weights) for k in range(chains)]}, y, names)
    tree = whole(parts, names, {"seed": seed, "defense": "bridge", "rule": "mean_prob"})
    tree["log_likelihood"].attrs["weights_are_random"] = 1
    tree["posterior_predictive"].attrs["chains"] = f"{chains} chains of given draws, in their order"
    return tree


def _drawn(leaves: Mapping[str, Tensor], log_probs: Tensor, chain: int, weights: bool) -> Drawn:
    """One chain: its leaves, without `weights` those that are small, and the mean square of each."""
    kept = {name: v[chain] for name, v in leaves.items() if weights or v[0, 0].numel() <= LAST_LAYER}
    rms = {name: v[chain].flatten(1).square().mean(1).sqrt() for name, v in leaves.items()}
    return Drawn(kept, {"weight_rms": rms}, log_probs[chain])


def _leaves(source: Any, chosen: Tensor) -> dict[str, Tensor]:
    """The draws by path, ``(chain, draw, ...)``."""
    import jax

    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(source.network.draws):
        keys = [str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path]
        found[".".join(keys) or "draws"] = torch.as_tensor(np.array(np.asarray(leaf)[chosen.numpy()]))
    return found
