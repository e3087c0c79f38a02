r"""Rewards for noise: without one, training on clean inputs takes every learned scale to zero.

$$ \ell(\phi, x, y) - \gamma_t\, R(\phi) $$

Eustratiadis et al., 2021, [Weight-covariance Alignment for Adversarially Robust Neural
Networks](https://arxiv.org/abs/2010.08852): noise along the weights of the classes. Jeddi et al., 2020,
[Learn2Perturb](https://arxiv.org/abs/2003.01090): large scales, at a price that falls. Yu et al., 2021,
[Simple and Effective Stochastic Neural
Networks](https://ojs.aaai.org/index.php/AAAI/article/view/16436): entropy.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from probdefense.nn.conditional_noise import ConditionalNoise
from probdefense.nn.correlated_noise import CorrelatedNoise
from probdefense.nn.noise import Noise
from probdefense.nn.placeholder import Placeholder
from probdefense.nn.relative_noise import RelativeNoise, WeightNoise
from probdefense.nn.transforms import Transform
from probdefense.types import Inputs, Labels, Objective
from probdefense.validation import check_count, check_function, check_number, check_objective, check_positive

Reward = Callable[[Any, Inputs], Tensor]
"""``reward(defense, x) -> scalar``: what is large for a defense with much noise."""


def entropy(defense: Any, x: Inputs | None = None) -> Tensor:
    r"""The differential entropy of one value of every trained noise, in nats.

    $$ \sum_l \sum_j \big( h(\varepsilon_l) + \log \sigma_{lj} \big), \qquad
       h(N(0, 1)) = \tfrac12 \log 2 \pi e $$

    The sum is over the entries of each trained scale: one for a scale shared by a layer, $C$ for one per
    channel. With a covariance it is $\tfrac12 \log \det 2 \pi e L L^\top$, with noise that depends on
    the input the mean over the batch. It has no upper bound, and its gradient in $\log \sigma$ is 1
    however large the scale: choose the weight of the reward with that in mind.

    Args:
        defense: A `Defense`.
        x: ``(batch, *event)``, needed where noise depends on the input, which costs a forward pass.

    Returns:
        A scalar.

    Raises:
        ValueError: no trained noise, or noise that depends on an input that was not given.

    References:
        Yu et al., 2021, [Simple and Effective Stochastic Neural
        Networks](https://ojs.aaai.org/index.php/AAAI/article/view/16436)

    Examples:
        >>> import probdefense as pd
        >>> net = torch.nn.Linear(4, 3)
        >>> defense = pd.defenses.rse(net, before_linear=True, scale="learned", sigma_init=1.0)
        >>> round(entropy(defense).item(), 4)
        1.4189
    """
    found = [
        layer.log_volume + scale.numel() * unit
        if isinstance(layer, CorrelatedNoise)
        else scale.abs().log().add(unit).sum()
        for layer, scale, unit in _scales(defense)
    ]
    found += [
        scale.log().add(_latent(layer).entropy()).flatten(1).sum(1).mean()
        for layer, scale in _conditional(defense, x)
    ]
    return _total(found, "noise with a trained scale")


def root_scale(defense: Any, x: Inputs | None = None) -> Tensor:
    r"""The sum of square roots of all trained scales, $\sum_l \sum_j \sqrt{\sigma_{lj}}$.

    Args:
        defense: A `Defense`.
        x: As in `entropy`.

    Returns:
        A scalar.

    Raises:
        ValueError: as `entropy`.

    References:
        Jeddi et al., 2020, [Learn2Perturb](https://arxiv.org/abs/2003.01090), with `harmonic`

    Examples:
        >>> import probdefense as pd
        >>> net = torch.nn.Linear(4, 3)
        >>> defense = pd.defenses.rse(net, before_linear=True, scale="learned", sigma_init=0.25)
        >>> round(root_scale(defense).item(), 4)
        0.5
    """
    found = [scale.abs().sqrt().sum() for _, scale, _ in _scales(defense)]
    found += [scale.sqrt().flatten(1).sum(1).mean() for _, scale in _conditional(defense, x)]
    return _total(found, "noise with a trained scale")


def alignment(defense: Any, x: Inputs | None = None) -> Tensor:
    r"""How much of the noise before a linear layer reaches its outputs, $\sum_k \log w_k^\top \Sigma w_k$.

    $\Sigma$ is the covariance of the noise, $L L^\top$ for a latent of variance 1, and $w_k$ the weights of
    output $k$, whose own noise this is the log-variance of. It grows with the weights as well: give them
    weight decay. The released code takes the logarithm of the sum over outputs instead, which one large
    output can satisfy.

    Args:
        defense: A `Defense` with trained noise before a linear layer, such as `wca` makes.
        x: As in `entropy`.

    Returns:
        A scalar.

    Raises:
        ValueError: no trained noise before a linear layer, or as `entropy`.

    References:
        Eustratiadis et al., 2021, [Weight-covariance Alignment for Adversarially Robust Neural
        Networks](https://arxiv.org/abs/2010.08852)

    Examples:
        >>> import probdefense as pd
        >>> net = torch.nn.Linear(1, 2, bias=False)
        >>> _ = torch.nn.init.constant_(net.weight, 20.0)
        >>> round(alignment(pd.defenses.wca(net)).item(), 4)  # noise of scale .1, weights of 20
        2.7726
    """
    weights, seen, found = _weights(defense), dict(_conditional(defense, x)), []
    for path, host in defense.net.named_modules():
        for layer in host.children() if isinstance(host, nn.Linear) else ():
            if isinstance(layer, ConditionalNoise):
                reached = (weights[path] * seen[layer].unsqueeze(-2)).square().sum(-1)
                found.append(reached.log().sum(-1).mean())
            elif isinstance(layer, Noise) and layer.learned:
                own = weights[path]
                mixed = own @ layer.mixing if isinstance(layer, CorrelatedNoise) else own * layer.scale
                found.append((mixed * _latent(layer).stddev).square().sum(-1).log().sum())
    return _total(found, "trained noise before a linear layer")


def harmonic(weight: float, num_steps: int) -> Callable[[int], float]:
    r"""A weight that falls with the epochs, $\gamma / \sum_{i \le t} 1/i$.

    Args:
        weight: $\gamma$.
        num_steps: Training steps per epoch.

    Returns:
        A function of the number of training steps done, for `rewarded`.

    Raises:
        ValueError: a negative weight, or `num_steps` below 1.

    References:
        Jeddi et al., 2020, [Learn2Perturb](https://arxiv.org/abs/2003.01090); the formula is that of
        the released code

    Examples:
        >>> falling = harmonic(1.0, num_steps=10)
        >>> [round(falling(step), 3) for step in (0, 9, 10, 20)]
        [1.0, 1.0, 0.667, 0.545]
    """
    weight, num_steps = check_positive("weight", weight, zero=True), check_count("num_steps", num_steps)
    return lambda step: weight / math.fsum(1 / i for i in range(1, step // num_steps + 2))


def rewarded(
    objective: Objective, weight: float | Callable[[int], float], reward: Reward = entropy
) -> Objective:
    r"""Any objective minus a reward for noise, $\ell(\phi, x, y) - \gamma_t\, R(\phi)$.

    Args:
        objective: What is minimized without the reward.
        weight: $\gamma$ in nats of loss per unit of reward, or a function of the number of training steps
            done, such as `harmonic`; steps are counted, and checkpoints of `fit` hold the count.
        reward: ``reward(defense, x) -> scalar``: `entropy`, `alignment`, `root_scale` or one of your own.

    Returns:
        ``objective(defense, x, y, **options)``.

    Raises:
        ValueError: a negative weight.

    References:
        Eustratiadis et al., 2021, [Weight-covariance Alignment](https://arxiv.org/abs/2010.08852);
        Jeddi et al., 2020, [Learn2Perturb](https://arxiv.org/abs/2003.01090)

    Examples:
        >>> import probdefense as pd
        >>> objective = rewarded(pd.objectives.elbo, 0.01, reward=alignment)
        >>> defense = pd.defenses.wca(torch.nn.Linear(4, 3))
        >>> objective(defense, torch.rand(8, 4), torch.zeros(8).long()).shape
        torch.Size([])
    """
    check_objective(objective)
    check_function("reward", reward, "defense", "x")
    if callable(weight):
        check_function("weight", weight, "step")
    counted = _Counted(weight if callable(weight) else check_positive("weight", weight, zero=True))

    def rewarded_objective(defense: Any, x: Inputs, y: Labels, **options: Any) -> Tensor:
        return objective(defense, x, y, **options) - counted() * reward(defense, x)

    return rewarded_objective


class _Counted:
    """A weight that knows how often it was asked for."""

    def __init__(self, weight: float | Callable[[int], float]):
        self.weight, self.steps = weight, 0

    def __call__(self) -> float:
        self.steps += 1
        return check_number("weight", self.weight(self.steps - 1)) if callable(self.weight) else self.weight

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def _scales(defense: Any) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """Layers, their trained scales times those of posteriors, and the entropy of the latent."""
    posteriors = {
        site.path.rpartition(".")[0]: site.posterior()
        for site in defense.sites.values()
        if site.local and site.posterior is not None
    }
    for path, layer in defense.net.named_modules():
        if not isinstance(layer, Noise | RelativeNoise | WeightNoise | Transform):
            continue
        scale = getattr(layer, "scale", getattr(layer, "alpha", None))
        unit = _latent(layer).entropy()
        if path in posteriors and scale is not None:
            fitted = posteriors[path]
            unit = (fitted.entropy() - fitted.scale.log()).flatten()[0].detach()
            scale = scale * fitted.scale
        if scale is not None and scale.requires_grad:
            yield layer, scale, unit


def _conditional(defense: Any, x: Inputs | None) -> list[tuple[ConditionalNoise, Tensor]]:
    """Layers whose noise depends on the input, with its scale ``(batch, *event)``, at one draw."""
    layers = [layer for layer in defense.net.modules() if isinstance(layer, ConditionalNoise)]
    if not layers:
        return []
    if x is None:
        raise ValueError("expected x, got none: the noise of this defense depends on its input; pass a batch")
    seen: list[tuple[ConditionalNoise, Tensor]] = []
    every = {
        site.name: site.center() for site in defense.sites.values() if getattr(site, "enumerated", False)
    }
    function = defense.at(defense.draw(x) | every)  # before the hooks: it may run the network on nothing
    hooks = [layer.register_forward_pre_hook(partial(_note, seen)) for layer in layers]
    try:
        function(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _note(
    seen: list[tuple[ConditionalNoise, Tensor]], layer: ConditionalNoise, args: tuple[Any, ...]
) -> None:
    seen.append((layer, layer.moments(args[0])[1]))


def _weights(defense: Any) -> dict[str, Tensor]:
    """The weight of every linear layer by path; of a random one the center."""
    tensors = dict(defense.net.named_parameters())
    for site in defense.sites.values():
        if not site.local and not site.perturbs:
            tensors.update(site.fill(site.center(), defense.net, tensors))
    linear = [path for path, layer in defense.net.named_modules() if isinstance(layer, nn.Linear)]
    return {path: tensors[f"{path}.weight".lstrip(".")] for path in linear}


def _latent(layer: nn.Module) -> Distribution:
    """The distribution of one value of the latent; of noise on weights it is standard normal."""
    hole = next((child for child in layer.children() if isinstance(child, Placeholder)), None)
    return Normal(torch.tensor(0.0), torch.tensor(1.0)) if hole is None else hole.family


def _total(found: list[Tensor], wanted: str) -> Tensor:
    if not found:
        raise ValueError(
            f"expected {wanted}, found none to reward in this defense; build it with wca(net) or "
            "rse(net, scale='learned')"
        )
    return torch.stack(found).sum()
