r"""Random Self-Ensemble: noise before every convolution, in training and at test.

Liu et al., 2018, [Towards Robust Neural Networks via Random Self-ensemble](https://arxiv.org/abs/1712.00673).
Each convolution sees $x + \sigma \varepsilon$ with fresh $\varepsilon \sim N(0, I)$; the noise met first,
on the raw pixels, has its own scale. Prediction averages the probabilities of many draws.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import Distribution

from probdefense.core.defense import Defense
from probdefense.core.families import Fixed, Spread
from probdefense.core.registry import builder
from probdefense.core.sites import NoiseSite, Site, join, layer_name
from probdefense.defenses.host import (
    CONVOLUTIONS,
    channels_of,
    device_and_dtype,
    host,
    output_shapes,
    running,
)
from probdefense.nn.correlated_noise import CorrelatedNoise
from probdefense.nn.noise import Noise
from probdefense.nn.placeholder import Placeholder, placeholders
from probdefense.nn.surgery import insert_after, insert_at_input, insert_before, matching
from probdefense.types import Inputs
from probdefense.validation import check_function, check_kind, check_member, check_positive

FEW = 4
"""So many linear layers per convolution are still a convolutional network."""

CORRELATED = ("full", "low_rank")
"""Covariances that are more than a scale per channel."""

RANK = 8
"""Columns of the factor of a low-rank covariance, where there are so many channels."""


@builder
def rse(
    net: nn.Module,
    *,
    num_data: int | None = None,
    sigma_init: float = 0.2,
    sigma_inner: float = 0.1,
    scale: Literal["fixed", "learned", "variational"] = "fixed",
    scale_shape: Literal["scalar", "channel", "element"] = "scalar",
    covariance: Literal["diagonal", "full", "low_rank"] | None = None,
    init_at: Literal["input", "conv"] = "input",
    before_linear: bool = False,
    after: Literal["block"] | None = None,
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

    With a full covariance the noise is $L \varepsilon$ at every position, $L$ lower triangular over
    channels (features, before a linear layer); with a low-rank one it has covariance
    $\mathrm{diag}(\sigma^2) + F F^\top$, $F$ of 8 columns. A full matrix over all elements would have 268
    million entries before the first convolution of a ResNet-20, and is refused.

    Args:
        net: A network or a `Defense`; it is copied, parameters keep their names.
        num_data: Size of the training set; needed only for ``scale="variational"``.
        sigma_init: Scale of the noise met first, in pixels with ``init_at="input"``.
        sigma_inner: Scale of every other noise, in units of the activations.
        scale: ``"fixed"`` (the paper); ``"learned"``, one trained scale in model and guide, no KL;
            ``"variational"``, a trained posterior scale against the fixed prior one, with a KL per
            example whose weight should be of order 1e-3 (at 1 the posterior is the prior).
        scale_shape: One trained scale per layer, per channel, or per element (needs `example`).
        covariance: Of the noise over channels, shared by positions: ``"diagonal"``, one scale per channel
            (as ``scale_shape="channel"``), ``"full"`` or ``"low_rank"``, which need ``scale="learned"``. None
            needs an `example`. By default noise is independent and `scale_shape` says what shares a scale.
        init_at: The first noise sits on the raw input, before any normalization inside the network,
            or directly before the first convolution.
        before_linear: Whether linear layers get noise too, the last one included.
        after: ``"block"`` puts the noise after every residual block instead (Learn2Perturb), all of scale
            `sigma_inner`; such a block is a module inside the network, no ``Sequential``, that owns
            two convolutions or more.
        where: ``(path, module) -> bool``, which modules get noise; overrides `before_linear`, and says
            which modules are the blocks.
        family: Standard distribution of the noise, ``Normal(0, 1)`` by default.
        multiplicative: Whether the noise multiplies its input.
        floor: The smallest value of a learned or variational scale; with a covariance that of a channel's
            own noise, the diagonal of its factor.
        when: Noise always, or only in training or only at test (the ablation of the paper's Fig. 2).
        example: A batch of inputs, with which the network runs once to see which layers run and what they
            receive; needed where that cannot be guessed, and for ``scale_shape="element"``.

    Returns:
        A `Defense` whose sites are named after the layers.

    Raises:
        ValueError: no module to put noise at, one chosen by `where` that never runs, an option
            outside its choices, or a covariance that is not learned or would be over all elements.

    References:
        Liu et al., 2018, [Towards Robust Neural Networks via Random Self-ensemble](https://arxiv.org/abs/1712.00673);
        Jeddi et al., 2020, [Learn2Perturb](https://arxiv.org/abs/2003.01090), for noise after blocks;
        Eustratiadis et al., 2021, [Weight-covariance Alignment](https://arxiv.org/abs/2010.08852), for
        the full covariance, there on 32 features only; how it does on feature maps is open.

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
    if after is not None:
        check_member("after", after, ("block",))
    if covariance is not None:
        _check_covariance(covariance, scale, scale_shape)
        scale_shape = "channel"
    net, sites, num_data = host(net, num_data)
    hosts = _hosts(net, before_linear, where, after)
    asked, at_input = where is not None, init_at == "input"
    places = _places(net, sites, hosts, example, after=after is not None, at_input=at_input, asked=asked)
    if where is None and after is None and not before_linear:
        _warn_of_linear(net, len(places))
    options: dict[str, Any] = {"floor": floor, "multiplicative": multiplicative, "when": when}
    like, holes = device_and_dtype(net, sites), {}
    for place in places:
        sigma = sigma_init if place.first else sigma_inner
        shape = _shape(scale_shape, place, example)
        if covariance in CORRELATED and place.channels[0] > 1:  # one channel has a variance only
            noise = _correlated(place, sigma, covariance == "low_rank", options)
        else:
            trained = scale == "learned"
            noise = Noise(sigma, learned=trained, shape=shape if trained else (), **options)
        if family is not None:  # a discrete one too: here the formula is what was asked for
            noise.eps = Placeholder(family)
        holes[f"{_insert(net, place, noise.to(like))}.eps"] = shape
    if scale == "variational":
        sites = [*sites, *(_variational(net, path, shape, floor) for path, shape in holes.items())]
    return Defense.from_sites(net, sites, num_data)


class _Place(NamedTuple):
    """Where one noise goes: before a layer, after it, or on the raw input; and what it is added to."""

    path: str
    host: nn.Module
    event: torch.Size
    side: Literal["before", "after", "input"]
    first: bool

    @property
    def channels(self) -> tuple[int, int]:
        """How many channels there are, and their axis in a batch."""
        return channels_of(self.host if self.side == "before" else None, self.event)


def _places(
    net: nn.Module,
    sites: list[Site],
    hosts: dict[str, nn.Module],
    example: Inputs | None,
    *,
    after: bool,
    at_input: bool,
    asked: bool,
) -> list[_Place]:
    """The places in the order of the hosts; the first is the one that runs first, unless after blocks."""
    seen = output_shapes(net, sites, hosts, example, asked=asked) if after else None
    seen = seen or running(net, sites, hosts, example, asked=asked)
    if not seen.shapes:
        raise ValueError(
            f"expected layers that run, found that {', '.join(hosts)} never run in {type(net).__name__}; "
            "choose others with where="
        )
    first = "" if after else next(iter(seen.shapes))
    places = []
    for path in filter(seen.shapes.__contains__, hosts):
        raw = at_input and not after and path == first
        event = seen.x.shape[1:] if raw and seen.x is not None else seen.shapes[path]
        side: Any = "input" if raw else "after" if after else "before"
        places.append(_Place(path, hosts[path], event, side, not after and path == first))
    return places


def _correlated(place: _Place, sigma: float, low_rank: bool, options: Mapping[str, Any]) -> Noise:
    channels, axis = place.channels
    rank = min(RANK, channels) if low_rank else None
    return CorrelatedNoise(sigma, channels, axis=axis, rank=rank, **options)


def _insert(net: nn.Module, place: _Place, noise: nn.Module) -> str:
    """Puts a layer there; returns its path."""
    if place.side == "input":
        return insert_at_input(net, "input_noise", noise)
    insert = insert_before if place.side == "before" else insert_after
    return join(place.path, insert(place.host, "noise", noise))


def _check_covariance(covariance: str, scale: str, scale_shape: str) -> None:
    check_member("covariance", covariance, ("diagonal", *CORRELATED))
    if covariance in CORRELATED and scale != "learned":
        raise ValueError(
            f"expected scale='learned' with covariance={covariance!r}, got scale={scale!r}; only a trained "
            "covariance differs from independent noise"
        )
    if scale_shape == "element":
        raise ValueError(
            f"expected a covariance over channels, got covariance={covariance!r} with scale_shape='element', "
            "a matrix over all elements of a feature map (16x32x32 of them make 268 million entries); leave "
            "one of the two out"
        )


def _hosts(
    net: nn.Module, before_linear: bool, where: Callable[[str, nn.Module], bool] | None, after: str | None
) -> dict[str, nn.Module]:
    if after is not None:
        return _blocks(net, where)
    kinds = (nn.Module,) if where else CONVOLUTIONS + ((nn.Linear,) if before_linear else ())
    hosts = dict(matching(net, kinds, where))
    if not hosts:
        wanted = "where(path, module)" if where else " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(
            f"expected layers, found nothing to put noise before in {type(net).__name__}; looked for "
            f"{wanted}; pass before_linear=True or where="
        )
    return hosts


def _blocks(net: nn.Module, where: Callable[[str, nn.Module], bool] | None) -> dict[str, nn.Module]:
    """The residual blocks of a network, or the modules that a caller says are blocks."""
    hosts = dict(matching(net, (nn.Module,), where or _is_block))
    if not hosts:
        raise ValueError(
            f"expected residual blocks, found nothing to put noise after in {type(net).__name__}; looked for "
            f"{'where(path, module)' if where else 'modules inside that own two convolutions'}; say with "
            "where=(path, module) which modules are its blocks"
        )
    return hosts


def _is_block(path: str, module: nn.Module) -> bool:
    own = sum(isinstance(child, CONVOLUTIONS) for child in module.children())
    return bool(path) and own > 1 and not isinstance(module, nn.Sequential)


def _shape(scale_shape: str, place: _Place, example: Inputs | None) -> tuple[int, ...]:
    """The shape of the scale of the noise at a place."""
    if scale_shape == "scalar":
        return ()
    if scale_shape == "channel":
        channels, axis = place.channels
        return (channels, *[1] * (len(place.event) - 1)) if axis == 1 else (channels,)
    if example is None:
        raise ValueError(
            "expected example= with scale_shape='element', which needs the shapes of the activations, got "
            "none; pass example=x"
        )
    return tuple(example.shape[1:] if place.side == "input" else place.event)


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
