r"""Random Self-Ensemble: noise before every convolution, in training and at test.

Liu et al., 2018, [Towards Robust Neural Networks via Random Self-ensemble](https://arxiv.org/abs/1712.00673).
Each convolution sees $x + \sigma \varepsilon$ with fresh $\varepsilon \sim N(0, I)$; the noise met first,
on the raw pixels, has its own scale. Prediction averages the probabilities of many draws.
"""

import warnings
from collections.abc import Callable
from typing import Literal

import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import Distribution

from probdefense.core.defense import Defense
from probdefense.core.families import Fixed, Spread
from probdefense.core.registry import builder
from probdefense.core.sites import NoiseSite, Site, layer_name
from probdefense.defenses.host import CONVOLUTIONS, device_and_dtype, host, per_channel, running
from probdefense.nn.noise import Noise
from probdefense.nn.placeholder import placeholders
from probdefense.nn.surgery import insert_at_input, insert_before, matching
from probdefense.types import Inputs
from probdefense.validation import check_function, check_kind, check_member, check_positive

FEW = 4
"""So many linear layers per convolution are still a convolutional network."""


@builder
def rse(
    net: nn.Module,
    *,
    num_data: int | None = None,
    sigma_init: float = 0.2,
    sigma_inner: float = 0.1,
    scale: Literal["fixed", "learned", "variational"] = "fixed",
    scale_shape: Literal["scalar", "channel", "element"] = "scalar",
    init_at: Literal["input", "conv"] = "input",
    before_linear: bool = False,
    where: Callable[[str, nn.Module], bool] | None = None,
    family: Distribution | None = None,
    multiplicative: bool = False,
    floor: float = 0.0,
    when: Literal["always", "train", "test"] = "always",
    example: Inputs | None = None,
) -> Defense:
    r"""Puts noise before every convolution of a network, shortcut ones included.

    Of a transformer that is the one convolution that makes the patches; a warning says so, and what
    `before_linear` and `where` would add.

    Args:
        net: A network or a `Defense`; it is copied, parameters keep their names.
        num_data: Size of the training set; needed only for ``scale="variational"``.
        sigma_init: Scale of the noise met first, in pixels with ``init_at="input"``.
        sigma_inner: Scale of every other noise, in units of the activations.
        scale: ``"fixed"`` (the paper); ``"learned"``, one trained scale in model and guide, no KL;
            ``"variational"``, a trained posterior scale against the fixed prior one, with a KL per
            example whose weight should be of order 1e-3 (at 1 the posterior is the prior).
        scale_shape: One trained scale per layer, per channel, or per element (needs `example`).
        init_at: The first noise sits on the raw input, before any normalization inside the network,
            or directly before the first convolution.
        before_linear: Whether linear layers get noise too, the last one included.
        where: ``(path, module) -> bool``, which modules get noise; overrides `before_linear`.
        family: Standard distribution of the noise, ``Normal(0, 1)`` by default.
        multiplicative: Whether the noise multiplies its input.
        floor: The smallest value of a learned or variational scale.
        when: Noise always, or only in training or only at test (the ablation of the paper's Fig. 2).
        example: A batch of inputs, with which the network runs once to see which layers run and what they
            receive; needed where that cannot be guessed, and for ``scale_shape="element"``.

    Returns:
        A `Defense` whose sites are named after the layers.

    Raises:
        ValueError: no module to put noise before, one chosen by `where` that never runs, or an option
            outside its choices.

    References:
        Liu et al., 2018, [Towards Robust Neural Networks via Random Self-ensemble](https://arxiv.org/abs/1712.00673)

    Examples:
        >>> import probdefense as pd
        >>> list(rse(pd.models.small_cnn()).sites)
        ['input_noise', '2.noise']
    """
    if family is not None:
        check_kind("family", family, Distribution, "give one with its numbers, such as Normal(0.0, 1.0)")
    for name, flag in (("before_linear", before_linear), ("multiplicative", multiplicative)):
        check_kind(name, flag, bool, "give True or False")
    if where is not None:
        check_function("where", where, "path", "module")
    check_positive("sigma_init", sigma_init, zero=True)
    check_positive("sigma_inner", sigma_inner, zero=True)
    check_member("scale", scale, ("fixed", "learned", "variational"))
    check_member("scale_shape", scale_shape, ("scalar", "channel", "element"))
    check_member("init_at", init_at, ("input", "conv"))
    check_positive("floor", floor, zero=True)
    net, sites, num_data = host(net, num_data)
    hosts = _hosts(net, before_linear, where)

    def layer(sigma: float, shape: tuple[int, ...]) -> Noise:
        learned = scale == "learned"
        return Noise(
            sigma,
            family=family,
            learned=learned,
            shape=shape if learned else (),
            floor=floor,
            multiplicative=multiplicative,
            when=when,
        ).to(like)

    met = running(net, sites, hosts, example, asked=where is not None).shapes
    if not met:
        raise ValueError(
            f"expected layers that run, found that {', '.join(hosts)} never run in {type(net).__name__}; "
            "choose others with where="
        )
    if where is None and not before_linear:
        _warn_of_linear(net, len(met))
    first, like = next(iter(met)), device_and_dtype(net, sites)
    holes = {}
    for path in filter(met.__contains__, hosts):
        at_input = path == first and init_at == "input"
        shape = _shape(scale_shape, hosts[path], met[path], example, at_input)
        noise = layer(sigma_init if path == first else sigma_inner, shape)
        if at_input:
            name = insert_at_input(net, "input_noise", noise)
        else:
            name = ".".join(filter(None, [path, insert_before(hosts[path], "noise", noise)]))
        holes[f"{name}.eps"] = shape
    if scale == "variational":
        sites = [*sites, *(_variational(net, path, shape, floor) for path, shape in holes.items())]
    return Defense.from_sites(net, sites, num_data)


def _hosts(
    net: nn.Module, before_linear: bool, where: Callable[[str, nn.Module], bool] | None
) -> dict[str, nn.Module]:
    kinds = (nn.Module,) if where else CONVOLUTIONS + ((nn.Linear,) if before_linear else ())
    hosts = dict(matching(net, kinds, where))
    if not hosts:
        wanted = "where(path, module)" if where else " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(
            f"expected layers, found nothing to put noise before in {type(net).__name__}; looked for "
            f"{wanted}; pass before_linear=True or where="
        )
    return hosts


def _shape(
    scale_shape: str, host: nn.Module, event: torch.Size, example: Inputs | None, at_input: bool
) -> tuple[int, ...]:
    """The shape of the scale of the noise before a layer."""
    if scale_shape == "scalar":
        return ()
    if scale_shape == "channel":
        return per_channel(host)
    if example is None:
        raise ValueError(
            "expected example= with scale_shape='element', which needs the shapes of the activations, got "
            "none; pass example=x"
        )
    return tuple(example.shape[1:] if at_input else event)


def _warn_of_linear(net: nn.Module, count: int) -> None:
    linear = sum(isinstance(module, nn.Linear) for module in net.modules())
    if linear > FEW * count:
        warnings.warn(
            f"noise goes before {count} of the layers of {type(net).__name__}, its convolutions, and before "
            f"none of its {linear} linear layers: of a transformer only the patches are made by one; "
            "before_linear=True adds those that run as modules (attention reads its own weights), "
            "where=(path, module) any others, such as whole blocks",
            stacklevel=4,
        )


def _variational(net: nn.Module, path: str, shape: tuple[int, ...], floor: float) -> Site:
    hole, layer = placeholders(net)[path], net.get_submodule(layer_name(path))
    assert isinstance(layer, Noise)
    prior = Fixed(hole.family)
    if prior.kind not in (dist.Normal, dist.Laplace):
        raise ValueError(
            f"scale='variational' needs Normal or Laplace noise, got {type(hole.family).__name__}"
        )
    if float(prior.get_buffer("loc")) != 0:
        raise ValueError(f"scale='variational' needs noise around 0, got {hole.family}")
    sigma, width = float(layer.scale), float(prior.get_buffer("scale"))
    if sigma * width <= floor:
        raise ValueError(f"expected scales above floor={floor}, got {sigma * width:g} at {layer_name(path)}")
    posterior = Spread(shape, prior.kind, floor / sigma, width)
    return NoiseSite(layer_name(path), prior.to(hole.value), posterior.to(hole.value), path)
