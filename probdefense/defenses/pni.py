r"""Parametric noise injection: trained noise on weights or activations, in proportion to their spread.

He et al., 2019, [Parametric Noise Injection](https://arxiv.org/abs/1811.09310). The weight of every
convolution and linear layer becomes $w + \alpha_l\, \mathrm{std}(w)\, \eta$, $\eta \sim N(0, I)$ drawn once
per forward pass, and $\alpha_l$ is trained with the weights. Plain training takes $\alpha$ to zero; the
paper keeps it up with half clean, half adversarial batches, ``mixed(elbo, pgd, weight=0.5)``.
"""

from collections.abc import Iterable
from typing import Literal

import pyro.distributions as dist
import torch
from torch import nn

from probdefense.core.defense import Defense
from probdefense.core.families import Fixed
from probdefense.core.registry import builder
from probdefense.core.sites import Site, WeightNoiseSite, WeightSite, tied_names, unused
from probdefense.defenses.host import CONVOLUTIONS, device_and_dtype, host, per_channel, running
from probdefense.nn.relative_noise import RelativeNoise, WeightNoise
from probdefense.nn.surgery import insert_after, insert_before, matching
from probdefense.types import Inputs
from probdefense.validation import check_member, check_positive


@builder
def pni(
    net: nn.Module,
    *,
    num_data: int | None = None,
    alpha_init: float = 0.25,
    place: Literal["weight", "input", "output"] = "weight",
    scale_shape: Literal["scalar", "channel", "element"] = "scalar",
    example: Inputs | None = None,
) -> Defense:
    r"""Adds trained noise to every convolution and linear layer, $v + \alpha_l\, \mathrm{std}(v)\, \eta$.

    The coefficients get no weight decay (`Defense.param_groups`). Weight noise is one draw for the
    whole batch; noise on inputs or outputs is drawn, and its deviation taken, for every example.
    Frozen weights (``requires_grad=False``) get no noise.

    Args:
        net: A network or a `Defense`; it is copied, parameters keep their names.
        num_data: Size of the training set; not needed, as the noise has no KL.
        alpha_init: Where every $\alpha$ starts.
        place: What gets noise: the weights (the paper's best), or what each layer receives or returns.
        scale_shape: One $\alpha$ per layer, per channel, or per element (of weights only).
        example: A batch of inputs, to see which layers run, for noise on inputs or outputs; needed where
            that cannot be guessed.

    Returns:
        A `Defense`; the coefficients are parameters named ``weight_noise.alpha`` or ``pni.alpha``.

    Raises:
        ValueError: no convolution or linear layer that runs, nothing but frozen weights, or an option
            outside its choices.

    References:
        He et al., 2019, [Parametric Noise Injection](https://arxiv.org/abs/1811.09310)

    Examples:
        >>> import probdefense as pd
        >>> defense = pni(pd.models.small_cnn())
        >>> list(defense.sites), defense(torch.rand(2, 1, 8, 8), num_samples=3).shape
        (['weight_noise'], torch.Size([3, 2, 10]))
    """
    check_positive("alpha_init", alpha_init)
    check_member("place", place, ("weight", "input", "output"))
    check_member("scale_shape", scale_shape, ("scalar", "channel", "element"))
    if place != "weight" and scale_shape == "element":
        raise ValueError(
            f"expected scale_shape 'scalar' or 'channel' with place={place!r}, got 'element'; it is for "
            "weights"
        )
    net, sites, num_data = host(net, num_data)
    kinds = (*CONVOLUTIONS, nn.Linear)
    layers = dict(matching(net, kinds))
    if not layers:
        raise ValueError(
            f"expected layers, found nothing to add noise to in {type(net).__name__}; looked for "
            f"{', '.join(kind.__name__ for kind in kinds)}; use a network with one"
        )
    if place == "weight":
        sites = [*sites, _on_weights(net, layers.values(), sites, alpha_init, scale_shape)]
        return Defense.from_sites(net, sites, num_data)
    insert, side = (insert_before, "in") if place == "input" else (insert_after, "out")
    like = device_and_dtype(net, sites)
    runs = running(net, sites, layers, example, asked=False).shapes
    if not runs:
        raise ValueError(
            f"expected layers that run, found that {', '.join(layers)} never run in {type(net).__name__}: "
            "their "
            "noise would not act; put it on the weights"
        )
    for path in runs:
        shape = per_channel(layers[path], side) if scale_shape == "channel" else ()
        insert(layers[path], "pni", RelativeNoise(alpha_init, shape, place=place).to(like))
    return Defense.from_sites(net, sites, num_data)


def _on_weights(
    net: nn.Module, layers: Iterable[nn.Module], sites: list[Site], alpha: float, scale_shape: str
) -> WeightNoiseSite:
    """One flat site for the noise of all weights, and a layer with the coefficients beside each."""
    owners = set(layers)
    random = [site for site in sites if isinstance(site, WeightSite) and not site.perturbs]
    moved = {names: shape for site in random for names, shape in _shapes(site)}
    kept = {names: weight.shape for weight, names in tied_names(net).items() if weight.requires_grad}
    noisy = {
        names: shape
        for names, shape in (moved | kept).items()
        if names[0].endswith("weight") and net.get_submodule(names[0].rpartition(".")[0]) in owners
    }
    if not noisy:
        raise ValueError(
            f"expected weights to add noise to, found that all weights of {type(net).__name__} are frozen "
            "(requires_grad=False) and get no noise; "
            "unfreeze those that shall have it"
        )
    name, like = unused("weight_noise", {site.name for site in sites}), device_and_dtype(net, sites)
    for names, shape in noisy.items():
        owner = net.get_submodule(names[0].rpartition(".")[0])
        alphas = {"scalar": (), "channel": (shape[0], *[1] * (len(shape) - 1)), "element": tuple(shape)}
        owner.add_module(name, WeightNoise(alpha, alphas[scale_shape]).to(like))
    standard = Fixed(dist.Normal(0.0, 1.0)).to(like)
    shapes = tuple(noisy.values())
    return WeightNoiseSite(name, standard, None, names=tuple(noisy), shapes=shapes, layer=name)


def _shapes(site: WeightSite) -> Iterable[tuple[tuple[str, ...], torch.Size]]:
    return zip(site.names, site.shapes, strict=True)
