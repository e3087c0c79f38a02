r"""Stein variational gradient descent: particles that climb the posterior and repel each other.

Liu and Wang, 2016, [Stein Variational Gradient Descent](https://arxiv.org/abs/1608.04471). Among the
directions of a ball of the kernel's function space, this one lowers the KL divergence fastest:

$$ \phi(\theta_i) = \frac1K \sum_j k(\theta_j, \theta_i) \nabla \log p(\theta_j \mid D)
   + \nabla_{\theta_j} k(\theta_j, \theta_i), \qquad k(\theta, \theta') = e^{-\|\theta - \theta'\|^2 / h} $$

with $h = \mathrm{med}^2 / \log K$, the median over pairs of the distance between two particles. The paper
leaves open how distances in many dimensions stay useful: with thousands of weights all pairs are about
equally far apart, $k \approx 1/K$ for all of them, and particles hardly feel each other.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from probdefense.objectives.elbo import elbo
from probdefense.types import Inputs, Labels, Objective
from probdefense.validation import check_objective, check_positive


def svgd(
    objective: Objective = elbo, *, prior_scale: float | None = 1.0, bandwidth: float | None = None
) -> Objective:
    r"""Moves the members of `particles` along the Stein direction, $-\phi / N$ as a gradient.

    The value is the negative log joint density per example, the mean over particles; its gradient is not that
    of the value, but the Stein direction over each particle's flat parameters. Parameters that belong to no
    particle, and coefficients of noise, get the gradient of `objective`. One network alone is one particle:
    then this finds the MAP.

    Args:
        objective: Minus the log-likelihood per example, at clean or attacked inputs, such as `elbo` or
            ``adversarial(elbo, pgd)``.
        prior_scale: $\sigma$ of the prior $N(0, \sigma^2 I)$ over each particle; None for a flat one.
        bandwidth: $h$; by the median of the present distances when None.

    Returns:
        ``objective(defense, x, y, **options)``.

    Raises:
        ValueError: a number that is not positive; when it is called, a defense without `num_data`, or
            members whose trained parameters differ in their shapes.

    References:
        Liu and Wang, 2016, [Stein Variational Gradient Descent: A General Purpose Bayesian Inference
        Algorithm](https://arxiv.org/abs/1608.04471)

    Examples:
        >>> import probdefense as pd
        >>> defense = pd.defenses.particles([torch.nn.Linear(4, 3) for _ in range(5)], num_data=8)
        >>> loss = svgd()(defense, torch.rand(8, 4), torch.zeros(8).long())
        >>> loss.backward()
        >>> loss.shape
        torch.Size([])
    """
    check_objective(objective)
    if prior_scale is not None:
        check_positive("prior_scale", prior_scale)
    if bandwidth is not None:
        check_positive("bandwidth", bandwidth)

    def svgd_objective(defense: Any, x: Inputs, y: Labels, **options: Any) -> Tensor:
        if defense.num_data is None:
            raise ValueError(
                "expected num_data, got none: prior and repulsion count once per data set; build the defense "
                "with num_data=len(train_set)"
            )
        loss = objective(defense, x, y, **options)
        groups = _particles(defense.net)
        count, flat = len(groups), [parameter for group in groups for parameter in group]
        ours = {id(parameter) for parameter in flat}
        others = [p for p in defense.parameters() if p.requires_grad and id(p) not in ours]
        slopes = _slopes(loss, [*flat, *others])
        slope, theta = (_stacked(part, count) for part in (slopes[: len(flat)], flat))
        precision = 0.0 if prior_scale is None else prior_scale**-2
        score = -count * defense.num_data * slope - precision * theta
        direction = -stein_direction(theta, score, bandwidth) / defense.num_data
        prior = precision * theta.square().sum() / (2 * count * defense.num_data)
        turned = direction.flatten().split([parameter.numel() for parameter in flat])
        return _with_slopes(loss + prior, [*flat, *others], [*turned, *slopes[len(flat) :]])

    return svgd_objective


def stein_direction(theta: Tensor, score: Tensor, bandwidth: float | None = None) -> Tensor:
    r"""The Stein direction $\phi$ at particles, with the Gaussian kernel of `svgd`.

    Args:
        theta: Flat particles, ``(K, D)``.
        score: $\nabla \log p$ at each, ``(K, D)``.
        bandwidth: $h$; by the median of the distances when None.

    Returns:
        ``(K, D)``.

    References:
        Liu and Wang, 2016, [Stein Variational Gradient Descent](https://arxiv.org/abs/1608.04471)

    Examples:
        >>> stein_direction(torch.tensor([[0.0], [1.0]]), torch.zeros(2, 1), bandwidth=1.0)
        tensor([[-0.3679],
                [ 0.3679]])
    """
    count = len(theta)
    if count == 1:
        return score
    squares = torch.cdist(theta, theta, compute_mode="donot_use_mm_for_euclid_dist").square()
    if bandwidth is None:
        pairs = squares[*torch.triu_indices(count, count, 1)].sqrt().sort().values
        median = float(pairs[(len(pairs) - 1) // 2] + pairs[len(pairs) // 2]) / 2
        bandwidth = max(median**2 / math.log(count), torch.finfo(theta.dtype).tiny)
    kernel = (-squares / bandwidth).exp()
    repulsion = (kernel.sum(1, keepdim=True) * theta - kernel @ theta) * (2 / bandwidth)
    return (kernel @ score + repulsion) / count


def _particles(net: nn.Module) -> list[list[nn.Parameter]]:
    """The trained parameters of each particle, or of the one network, without coefficients of noise.

    Raises:
        ValueError: particles of different shapes, or without trained parameters.
    """
    members = getattr(net, "members", None)
    nets = list(members) if isinstance(members, nn.ModuleList) else [net]
    noise = {
        id(p) for m in net.modules() if getattr(m, "noise_coefficients", False) for p in m.parameters(False)
    }
    groups = [[p for p in each.parameters() if p.requires_grad and id(p) not in noise] for each in nets]
    if not groups[0] or len({tuple(p.shape for p in group) for group in groups}) > 1:
        raise ValueError(
            "expected networks whose trained parameters have the same shapes, so that they have a distance, "
            f"got {[sum(p.numel() for p in group) for group in groups][:8]} trained numbers; build with "
            "particles(nets), make nothing random that is to move, and freeze the same parts of all"
        )
    return groups


def _slopes(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if s is None else s for p, s in zip(parameters, found, strict=True)]


def _with_slopes(value: Tensor, parameters: list[nn.Parameter], slopes: list[Tensor]) -> Tensor:
    """A number whose gradients are given."""
    pairs = zip(parameters, slopes, strict=True)
    linear = torch.stack([(p * s.view_as(p)).sum() for p, s in pairs]).sum()
    return value.detach() + linear - linear.detach()


def _stacked(parts: Sequence[Tensor], count: int) -> Tensor:
    """Tensors of all particles, one particle after the other, as ``(K, D)``."""
    return torch.cat([part.detach().flatten() for part in parts]).view(count, -1)


def draws_of(defense: Any, num_samples: int) -> int:
    """How many draws stand for all: one per member of an ensemble, else as many as asked for."""
    sites: Mapping[str, Any] = defense.sites
    members = [site.count for site in sites.values() if getattr(site, "enumerated", False)]
    return members[0] if len(members) == len(sites) == 1 else num_samples
