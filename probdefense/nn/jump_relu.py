r"""A ReLU with a jump: small activations are cut off, large ones pass unchanged.

Erichson et al., 2020, [JumpReLU: A Retrofit Defense Strategy for Adversarial
Attacks](https://arxiv.org/abs/1904.03750). With a random threshold the mean of the activation is
smooth, $\mathbb{E}\, J_\kappa(z) = z F(z)$ with $F$ the distribution function of $\kappa$.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import threshold

from probdefense.nn.placeholder import Placeholder
from probdefense.types import Inputs
from probdefense.validation import check_positive


class JumpReLU(nn.Module):
    r"""Cuts off activations at or below a threshold, $J_\kappa(z) = z\, 1[z > \max(\kappa, 0)]$.

    With $\kappa = 0$ it is the ReLU exactly. The derivative is $1[z > \kappa]$: units between 0 and
    $\kappa$ pass no gradient, and the jump itself is invisible to it (see `smoothed_jump`).

    Args:
        kappa: The threshold, in units of the activations, or its distribution: one value per example
            and use, drawn by the defense. Its mean stands in the static base.

    Attributes:
        kappa: The threshold, or the mean of its distribution.

    Raises:
        ValueError: a negative threshold, or a distribution whose mean is negative or not finite.

    Examples:
        >>> JumpReLU(0.5)(torch.tensor([-1.0, 0.3, 0.5, 0.7]))
        tensor([0.0000, 0.0000, 0.0000, 0.7000])
    """

    function_settings = ("kappa",)

    def __init__(self, kappa: float | Distribution):
        super().__init__()
        typical = kappa.mean if isinstance(kappa, Distribution) else kappa
        self.kappa = float(check_positive("kappa", typical, zero=True))
        self.threshold: Placeholder | None = None
        if isinstance(kappa, Distribution):
            self.threshold = Placeholder(kappa, neutral=self.kappa, axes=0)

    def forward(self, z: Inputs) -> Tensor:
        """``(batch, *event) -> (batch, *event)``."""
        if self.threshold is None:
            return threshold(z, self.kappa, 0.0)
        kappa = self.threshold(z).clamp_min(0.0)
        # Arithmetic, because comparing and masking take six times as long on a CPU.
        return z * (z.detach() - kappa).clamp_min_(0.0).sign_()

    def extra_repr(self) -> str:
        return f"kappa={self.kappa:.4g}, random={self.threshold is not None}"


class MarginalJumpReLU(nn.Module):
    r"""The mean of a `JumpReLU` over its threshold, $\max(z, 0)\, F(z)$, with $F$ trained.

    A Normal threshold makes it a shifted GELU. It needs no straight-through estimator, and gradients
    reach the units below the threshold.

    Args:
        kappa: Where the distribution of the threshold starts; location and scale are trained.

    Raises:
        ValueError: a distribution without location and scale.

    Examples:
        >>> layer = MarginalJumpReLU(torch.distributions.Normal(0.5, 0.1))
        >>> layer(torch.tensor([-1.0, 0.5, 2.0])).detach()
        tensor([0.0000, 0.2500, 2.0000])
    """

    noise_coefficients = True  # no weight decay on these parameters, and no prior by default

    function_settings = ("kind",)

    def __init__(self, kappa: Distribution):
        super().__init__()
        if not {"loc", "scale"} <= set(getattr(kappa, "arg_constraints", ())):
            raise ValueError(
                "a trained threshold needs a distribution with loc and scale, such as Normal(0.5, 0.1), "
                f"got {kappa!r}"
            )
        self.kind: Any = type(kappa)
        self.loc = nn.Parameter(torch.tensor(float(kappa.loc)))  # type: ignore[attr-defined]
        self.log_scale = nn.Parameter(torch.tensor(float(kappa.scale)).log())  # type: ignore[attr-defined]

    def forward(self, z: Inputs) -> Tensor:
        """``(batch, *event) -> (batch, *event)``."""
        kappa = self.kind(self.loc, self.log_scale.exp(), validate_args=False)
        return z.clamp_min(0.0) * kappa.cdf(z)


def smoothed_jump(kappa: float, width: float = 0.25) -> Callable[[Tensor], Tensor]:
    r"""The activation to differentiate in place of a jump, $z\, s((z - \kappa) / \tau)$, $s$ the logistic.

    Its derivative restores the impulse at the threshold and reaches the units below it: a surrogate
    for backward passes (BPDA).

    Args:
        kappa: The threshold.
        width: $\tau / \kappa$, the width of the smoothed jump relative to the threshold.

    Returns:
        ``z -> z'``, differentiable everywhere; the identity for $\kappa = 0$, behind a ReLU.

    Examples:
        >>> smoothed_jump(0.5)(torch.tensor([0.5]))
        tensor([0.2500])
    """
    check_positive("width", width)
    if kappa == 0:
        return lambda z: z
    return lambda z: z * torch.sigmoid((z - kappa) / (width * kappa))
