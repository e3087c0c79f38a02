r"""Local reparameterization: noise on what a layer computes instead of on its weights, in training.

Kingma, Salimans and Welling, 2015, [Variational Dropout and the Local Reparameterization
Trick](https://arxiv.org/abs/1506.02557). With independent normal weights the outputs of a linear layer are
normal for every example, so examples need not share one draw, and the gradient of the ELBO varies less:

$$ z_{ij} = \sum_k x_{ik} \mu_{kj} + \varepsilon_{ij} \sqrt{\textstyle\sum_k x_{ik}^2 \sigma_{kj}^2} $$

It is exact where a layer sees one vector per example. Of a convolution, and of a linear layer over a
sequence, the outputs of one example share their weights and are correlated; here each has noise of its own,
which is the usual approximation: every output is distributed as it should be, and together they are not.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probdefense.core.families import MeanField
from probdefense.core.sites import Site, WeightSite

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Whose outputs are sums of independent weights."""


class Moments(NamedTuple):
    """Means and variances of the parameters of a layer; without a variance a parameter is not random."""

    weight: Tensor
    weight_variance: Tensor
    bias: Tensor | None
    bias_variance: Tensor | None


def check_local(site: WeightSite, name: str = "estimator") -> None:
    """Refuses a posterior whose sums are not independent normal numbers.

    Raises:
        ValueError: another family, or a guide with correlations.
    """
    posterior = site.posterior
    if type(posterior) is not MeanField or posterior.kind is not dist.Normal:
        raise ValueError(
            f"expected {name}='weights' for weights that are not independent normal numbers, got 'local'; "
            "leave family= and rank= as they are by default, or the estimator"
        )


@contextmanager
def local_noise(net: nn.Module, sites: Iterable[Site]) -> Iterator[None]:
    """Inside the block layers with random weights of the local estimator draw their outputs.

    Tied weights, and those that other sites perturb, are drawn as ever.

    Raises:
        ValueError: a layer runs twice; its uses would not share their weights.
    """
    sites = list(sites)
    local = [site for site in sites if isinstance(site, WeightSite) and site.estimator == "local"]
    layers = _layers(net, local, _perturbed(sites)) if local else {}
    try:
        for path, moments in layers.items():
            layer = net.get_submodule(path)
            layer.__dict__["forward"] = partial(_noisy, layer, moments, [path])
        yield
    finally:
        for path in layers:
            net.get_submodule(path).__dict__.pop("forward", None)


def _perturbed(sites: list[Site]) -> set[str]:
    return {n for s in sites if isinstance(s, WeightSite) and s.perturbs for names in s.names for n in names}


def _layers(net: nn.Module, sites: list[WeightSite], perturbed: set[str]) -> dict[str, Moments]:
    """The layers, by path, whose weights are random, untied and not perturbed."""
    mean: dict[str, Tensor] = {}
    variance: dict[str, Tensor] = {}
    for site in sites:
        own = {names[0] for names in site.names if len(names) == 1 and names[0] not in perturbed}
        for moment, into in zip(site.moments(), (mean, variance), strict=True):
            into |= {name: value for name, value in site.views(moment).items() if name in own}
    taken = {name for site in sites for names in site.names for name in names}
    found: dict[str, Moments] = {}
    for path, layer in net.named_modules():
        weight, bias = (f"{path}.{name}" if path else name for name in ("weight", "bias"))
        drawn = bias in taken and bias not in mean  # with the weights, as of a tied one
        if weight in mean and type(layer) in LAYERS and "forward" not in vars(layer) and not drawn:
            own = mean.get(bias, layer.bias)
            found[path] = Moments(mean[weight], variance[weight], own, variance.get(bias))
    return found


def _noisy(layer: Any, moments: Moments, unused: list[str], x: Tensor) -> Tensor:
    """A draw of the outputs of a layer."""
    if not unused:
        raise ValueError(
            f"expected estimator='weights' for a network whose layer ({type(layer).__name__}) runs twice, "
            "got 'local', in which its uses would not share weights"
        )
    unused.pop()
    mean = _apply(layer, x, moments.weight, moments.bias)
    variance = _apply(layer, x.square(), moments.weight_variance, moments.bias_variance)
    deviation = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()
    return torch.addcmul(mean, deviation, torch.randn_like(mean))


def _apply(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)
