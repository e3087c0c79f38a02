r"""Bounds of a network on a box of inputs, for all weights of a box, or for all but a few of a posterior.

Let a layer be $W x + b$ with $x$ in the box $c \pm r$. If $|W - M| \le R$ elementwise (a *box* of weights),
its output lies within

$$ M c + b \;\pm\; \big(|M|\, r + R\, (|c| + r) + R_b\big) $$

If instead $W \sim N(M, S^2)$ with independent elements (*tails*), then $W_i c + |W_i|\, r$ is a convex
function of $W_i$ with slopes of at most $|c| + r$, so that it exceeds its mean by $t$ times
$L_i = \sqrt{S_i^2\, (|c| + r)^2}$ with probability at most $1 - \Phi(t)$ (its median is below its mean,
Kwapien, 1994; around the median it concentrates as a normal variable does, Borell, 1975). So but for that
probability on either side its output lies within

$$ M c + b \;\pm\; \big(\mathbb{E}|W|\, r + t\, L\big) $$

Everything is in double precision and widened by more than its rounding.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, linear

from probdefense.nn.normalize import Normalize

UNIT = 2.3e-16
"""More than the relative rounding of one operation in double precision."""

WIDER = 1e-12
"""Relative, and more than the rounding of sums and functions."""

MONOTONE = (
    *(nn.ReLU, nn.Flatten, nn.Identity, nn.MaxPool1d, nn.MaxPool2d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.Unflatten),
)
"""Layers whose outputs grow with their inputs: both ends of a box go through."""

KNOWN = "Sequential of Linear, Conv, ReLU, Flatten, pooling, BatchNorm and Normalize"


class Uncertain(NamedTuple):
    """Values around a center: a radius of a box, or a standard deviation."""

    center: Tensor
    spread: Tensor


class Layer(NamedTuple):
    """A linear layer (``apply(x, weight)`` without bias), or a monotone one (``apply(x)``)."""

    apply: Callable[..., Tensor]
    weight: Uncertain | None = None
    bias: Uncertain | None = None
    fan_in: int = 1

    @property
    def random(self) -> bool:
        """Whether its parameters spread."""
        parts = [part for part in (self.weight, self.bias) if part is not None]
        return any(bool(part.spread.any()) for part in parts)


class Box(NamedTuple):
    """All points between two tensors."""

    low: Tensor
    high: Tensor

    def only(self, rows: int | Tensor) -> "Box":
        """The box of one example, or of some."""
        rows = torch.tensor([rows]) if isinstance(rows, int) else rows
        return Box(self.low[rows], self.high[rows])


def layers_of(net: nn.Module, parameters: Mapping[str, Uncertain]) -> list[Layer]:
    """A network as layers; parameters that are not given stand still.

    Raises:
        ValueError: a layer that is not known, or a last one that is not linear.
    """
    found = [_layer(module, path, parameters) for path, module in _leaves(net, "")]
    linear_last = bool(found) and found[-1].apply is linear
    if not linear_last:
        raise ValueError(
            f"expected a network that ends in a Linear layer, got {type(net).__name__}: a {KNOWN}"
        )
    return found


def _leaves(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if type(module) is not nn.Sequential:
        yield path, module
        return
    for name, child in module.named_children():
        yield from _leaves(child, f"{path}.{name}" if path else name)


def _layer(module: Any, path: str, parameters: Mapping[str, Uncertain]) -> Layer:
    def value(name: str) -> Uncertain | None:
        key = f"{path}.{name}" if path else name
        if key in parameters:
            return parameters[key]
        own = getattr(module, name)
        return None if own is None else _still(own)

    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"expected a network without hooks, found one at {path!r}; its bounds are not known")
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return Layer(nn.Identity())  # whatever its mode: nothing but the weights is random
    if type(module) in MONOTONE:
        return Layer(module)
    if type(module) is nn.Linear:
        return Layer(linear, value("weight"), value("bias"), module.in_features)
    if type(module) in (nn.Conv1d, nn.Conv2d) and module.padding_mode == "zeros":
        convolve = conv1d if type(module) is nn.Conv1d else conv2d
        options = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}
        fan_in = module.in_channels // module.groups * math.prod(module.kernel_size)
        return Layer(lambda x, w: convolve(x, w, **options), value("weight"), value("bias"), fan_in)
    if type(module) is Normalize:
        return _scaled(1 / module.std.double(), -module.mean.double() / module.std.double())
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
        return _normalized(module, path, parameters)
    raise ValueError(
        f"expected a {KNOWN}, found {type(module).__name__} at {path!r}; its bounds are not known"
    )


def _normalized(module: Any, path: str, parameters: Mapping[str, Uncertain]) -> Layer:
    """Batch normalization by its running statistics."""
    if any(f"{path}.{name}" in parameters for name in ("weight", "bias")):
        raise ValueError(f"expected fixed parameters of the normalization at {path!r}, got random ones")
    scale = (module.running_var.double() + module.eps).rsqrt()
    scale = scale if module.weight is None else scale * module.weight.double()
    shift = -module.running_mean.double() * scale
    return _scaled(scale, shift if module.bias is None else shift + module.bias.double())


def _scaled(scale: Tensor, shift: Tensor) -> Layer:
    """One factor per channel, as a layer."""

    def apply(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight.view(-1, *[1] * (x.dim() - 2))

    return Layer(apply, _still(scale), _still(shift))


def _still(value: Tensor) -> Uncertain:
    value = value.detach().cpu().double()
    return Uncertain(value, torch.zeros_like(value))


def through(layers: list[Layer], box: Box, reach: float | None = None) -> Box:
    """The box of outputs of layers.

    Args:
        layers: From first to last.
        box: Of inputs, double.
        reach: None for boxes of weights; $t$ for tails, where spreads are standard deviations.
    """
    for layer in layers:
        if layer.weight is None:
            low, high = layer.apply(box.low), layer.apply(box.high)
            box = Box(low - WIDER * low.abs(), high + WIDER * high.abs())
        else:
            center, inputs, weights = spreads(layer, box, reach is not None)
            radius = inputs + (weights if reach is None else reach * weights)
            box = Box(center - radius, center + radius)
    return box


def spreads(layer: Layer, box: Box, tails: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of a linear layer: the center of its outputs, what inputs add to the radius, and what weights add.

    The last is ``R (|c| + r) + R_b`` for boxes and $L$ for tails.
    """
    assert layer.weight is not None
    center, half = (box.low + box.high) / 2, (box.high - box.low) / 2
    (mean, spread), size = layer.weight, center.abs() + half
    bias = _still(torch.zeros(())) if layer.bias is None else layer.bias
    out = layer.apply(center, mean)
    slack = 4 * UNIT * (layer.fan_in + 10) * layer.apply(size, mean.abs() + spread)
    slack = slack + 4 * UNIT * _channels(bias.center.abs() + bias.spread, out)
    if tails:
        inputs = layer.apply(half, _mean_size(layer.weight))
        weights = layer.apply(size.square(), spread.square()) + _channels(bias.spread.square(), out)
        weights = weights.sqrt()
    else:
        inputs = layer.apply(half, mean.abs())
        weights = layer.apply(size, spread) + _channels(bias.spread, out)
    return out + _channels(bias.center, out), inputs + slack, weights * (1 + WIDER)


def against(last: Layer, label: int, tails: bool) -> Layer:
    """The last layer as differences of the logit of `label` and every other one."""
    assert last.weight is not None
    others = torch.arange(len(last.weight.center)) != label

    def difference(part: Uncertain) -> Uncertain:
        center, spread = part.center[label] - part.center[others], part.spread[others]
        own = part.spread[label].expand_as(spread)
        return Uncertain(center, torch.hypot(own, spread) if tails else own + spread)

    return last._replace(
        weight=difference(last.weight), bias=None if last.bias is None else difference(last.bias)
    )


def _mean_size(weight: Uncertain) -> Tensor:
    r"""$\mathbb{E}|W|$ of normal elements, rounded up."""
    mean, deviation = weight
    ratio = mean / deviation.clamp_min(1e-300)
    folded = deviation * math.sqrt(2 / math.pi) * torch.exp(-ratio.square() / 2)
    return (folded + mean * torch.erf(ratio / math.sqrt(2))).maximum(mean.abs()) * (1 + WIDER)


def _channels(values: Tensor, like: Tensor) -> Tensor:
    """One value per output channel, to be added to outputs ``(batch, channels, ...)``."""
    return values.view(-1, *[1] * (like.dim() - 2))
