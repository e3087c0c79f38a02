r"""Priors with parts of their own: scales that are learned or drawn, mixtures, centers.

A distribution is a prior as it is. What is made here is more: a scale per layer that is trained with the
guide (empirical Bayes), one that has a prior of its own and a posterior (hierarchical), Blundell's mixture of
a wide and a narrow Normal, and a Normal around given weights. All of them are taken by ``bayesian(prior=)``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from probdefense.core.families import Fixed, LogNormalScale, MeanField, ScaleMixture
from probdefense.core.registry import recordable
from probdefense.rng import forked
from probdefense.validation import check_kind, check_positive, check_share

__all__ = ["centered", "hierarchical", "learned_scale", "mixture"]

POINTS = (1e-6, 1.0, 1e6, -1.0)
"""Values that a distribution of scales must allow, and one that it must not."""


@recordable
@dataclass(frozen=True)
class LayerScales:
    """A zero-mean Normal with one scale per layer, trained from `init` or drawn from `hyper`."""

    init: float
    hyper: Distribution | None = None

    def prior(self, names: list[str], sizes: list[int], like: Tensor) -> "Scales":
        """The prior of parameters of these names, joined to one vector."""
        return Scales(self.init, names, sizes, trained=self.hyper is None).to(like)

    def sides(self, prior: "Scales", like: Tensor) -> tuple[nn.Module, nn.Module] | None:
        """Prior and posterior of the scales, where they are drawn."""
        if self.hyper is None:
            return None
        start = torch.full((len(prior.layers),), self.init).log()
        posterior = MeanField(start, 0.1, LogNormalScale)
        return Fixed(self.hyper).to(like), posterior.to(like)


class Scales(nn.Module):
    r"""$N(0, s_{l(i)}^2)$ for every element $i$ of layer $l$; the scales are trained, or given."""

    noise_coefficients = True  # no weight decay on the scales
    function_settings = ("layers",)

    def __init__(self, init: float, names: list[str], sizes: list[int], trained: bool):
        super().__init__()
        of = [name.rpartition(".")[0] for name in names]
        self.layers = list(dict.fromkeys(of))
        self.places = [(self.layers.index(layer), size) for layer, size in zip(of, sizes, strict=True)]
        start = torch.full((len(self.layers),), init).log()
        if trained:
            self.log_scale = nn.Parameter(start)
        else:
            self.register_buffer("log_scale", start)

    def forward(self, scales: Tensor | None = None) -> Distribution:
        """The distribution of the flat vector at these scales ``(layers,)``, or at its own."""
        scales = self.log_scale.exp() if scales is None else scales.reshape(-1)
        scale = torch.cat([scales[layer].expand(size) for layer, size in self.places])
        return dist.Normal(torch.zeros_like(scale), scale, validate_args=False)


@recordable
class Centered:
    """A Normal around given weights; without any, around those that it is asked about."""

    def __init__(self, scale: float, weights: Mapping[str, Tensor] | None = None):
        self.scale, self.weights = scale, weights

    def record(self) -> dict[str, Any]:
        """What a file needs: the centers come with the state."""
        return {"scale": self.scale}

    def __call__(self, name: str, tensor: Tensor) -> Distribution:
        center = tensor if self.weights is None else self.weights.get(name)
        if center is None or center.shape != tensor.shape:
            came = "none" if center is None else f"one of shape {tuple(center.shape)}"
            raise ValueError(
                f"expected a weight {name} of shape {tuple(tensor.shape)} to center the prior on, got "
                f"{came}; give centered(net, scale) a network like the one that becomes random"
            )
        return dist.Normal(center.detach().to(tensor), self.scale)


def learned_scale(init: float = 1.0) -> LayerScales:
    r"""A Normal prior whose scale is trained with the guide, one per layer: empirical Bayes.

    $$ p(\theta_l) = N(0, s_l^2 I), \qquad
       s_l^2 = \tfrac{1}{D_l} \sum_{i \in l} (\mu_i^2 + \sigma_i^2) \text{ where the KL is least} $$

    A layer is what owns the parameters, so weight and bias share a scale; with ``layout="per_tensor"`` each
    tensor has its own. The scale follows the weights: with a KL weight of 0 it stays where it is, and where
    the data say little, posterior and prior may shrink together without a cost, which prunes the layer.

    Args:
        init: Where every $s_l$ starts, in units of the weights.

    Returns:
        What ``bayesian(prior=)`` takes; the scales are ``model.priors.weights.log_scale``.

    Raises:
        ValueError: `init` is not positive.

    References:
        MacKay, 1992, [A Practical Bayesian Framework for Backpropagation
        Networks](https://doi.org/10.1162/neco.1992.4.3.448)

    Examples:
        >>> import probdefense as pd
        >>> prior = pd.priors.learned_scale(0.5)
        >>> defense = pd.defenses.bayesian(torch.nn.Linear(4, 3), num_data=9, prior=prior)
        >>> defense.model.priors["weights"]().scale[:2].detach()
        tensor([0.5000, 0.5000])
    """
    return LayerScales(check_positive("init", init))


def hierarchical(hyper: Distribution) -> LayerScales:
    r"""A Normal prior whose scale, one per layer, has a prior and a posterior of its own.

    $$ \tau_l \sim h, \quad \theta_l \mid \tau_l \sim N(0, \tau_l^2 I), \qquad
       q(\tau_l) = \mathrm{LogNormal}(m_l, v_l^2) $$

    The scales are the site ``"weights_scale"`` of model and guide, and so of ArviZ. The KL of the weights is
    closed given $\tau$; that of $\tau$ is a Gauss-Hermite quadrature of 32 points, as good as closed.

    Args:
        hyper: $h$, a distribution of positive numbers, of one element: ``HalfCauchy(1.0)`` for example.

    Returns:
        What ``bayesian(prior=)`` takes.

    Raises:
        TypeError: no distribution.
        ValueError: one that has a shape or does not allow every positive number.

    References:
        Gelman, 2006, [Prior distributions for variance parameters in hierarchical
        models](https://doi.org/10.1214/06-BA117A)

    Examples:
        >>> import probdefense as pd, pyro.distributions as dist
        >>> prior = pd.priors.hierarchical(dist.HalfCauchy(1.0))
        >>> list(pd.defenses.bayesian(torch.nn.Linear(4, 3), num_data=9, prior=prior).sites)
        ['weights_scale', 'weights']
    """
    check_kind("hyper", hyper, Distribution, "such as pyro.distributions.HalfCauchy(1.0)")
    shape = hyper.batch_shape + hyper.event_shape
    support: Any = hyper.support
    if shape or support.check(torch.tensor(POINTS)).tolist() != [True, True, True, False]:
        raise ValueError(
            f"expected hyper as one distribution of every positive number, got {hyper} of shape "
            f"{tuple(shape)}; take HalfCauchy(1.0), HalfNormal(1.0) or LogNormal(0.0, 1.0)"
        )
    with forked(0):
        return LayerScales(float(hyper.sample((1001,)).median()), hyper)


def mixture(scale_1: float = 1.0, scale_2: float = 0.0025, weight: float = 0.5) -> Distribution:
    r"""Blundell's prior: a wide and a narrow Normal around zero, the same for every element.

    $$ p(\theta) = \prod_i \pi N(\theta_i; 0, \sigma_1^2) + (1 - \pi) N(\theta_i; 0, \sigma_2^2) $$

    Its KL has no closed form and is estimated by the densities at the draw, as in the paper, with a warning.
    The paper scanned $\pi \in \{1/4, 1/2, 3/4\}$, $-\log\sigma_1 \in \{0, 1, 2\}$ and $-\log\sigma_2 \in \{6,
    7, 8\}$; it does not say which was best.

    Args:
        scale_1: $\sigma_1$ of the wide part.
        scale_2: $\sigma_2$ of the narrow part; the default is about $e^{-6}$.
        weight: $\pi$, the share of the wide part.

    Returns:
        A distribution of one element.

    Raises:
        ValueError: a scale that is not positive, or a weight outside (0, 1).

    References:
        Blundell et al., 2015, [Weight Uncertainty in Neural Networks](https://arxiv.org/abs/1505.05424)

    Examples:
        >>> mixture(1.0, 0.1, 0.5).log_prob(torch.zeros(())).exp()  # (1 + 10) / 2 / sqrt(2 pi)
        tensor(2.1942)
    """
    wide, narrow = check_positive("scale_1", scale_1), check_positive("scale_2", scale_2)
    numbers = torch.tensor([wide, narrow, check_share("weight", weight)])
    return ScaleMixture(numbers[0], numbers[1], numbers[2])


def centered(net: nn.Module, scale: float) -> Centered:
    r"""A Normal prior around the weights of a network, $N(\theta^0, s^2 I)$: for pretrained weights.

    Args:
        net: The network whose weights are the centers, by name, as they are now.
        scale: $s$, in units of the weights.

    Returns:
        What ``bayesian(prior=)`` takes.

    Raises:
        TypeError: not a module.
        ValueError: a scale that is not positive; when it is used, a parameter that `net` does not have.

    References:
        Krishnan et al., 2020, [Specifying Weight Priors in Bayesian Deep Neural Networks with Empirical
        Bayes](https://arxiv.org/abs/1906.05323)

    Examples:
        >>> import probdefense as pd
        >>> net = torch.nn.Linear(4, 3)
        >>> defense = pd.defenses.bayesian(net, num_data=9, prior=pd.priors.centered(net, 0.1))
        >>> bool((defense.model.priors["weights"]().loc[:12] == net.weight.flatten()).all())
        True
    """
    check_kind("net", net, nn.Module, "the network whose weights are the centers")
    named = net.named_parameters(remove_duplicate=False)
    weights = {name: value.detach().clone() for name, value in named}
    return Centered(check_positive("scale", scale), weights)
