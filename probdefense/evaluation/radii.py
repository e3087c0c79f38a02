r"""Certified radii of input noise: how far a share of votes carries, by family and norm.

Let $p$ be the share (or mean probability) of the winner under noise on the raw pixels. It stays above one
half within

$$ R_2 = \sigma\, \Phi^{-1}(p), \qquad R_1 = -\lambda \log(2 (1 - p)), \qquad R_1 = 2 \lambda (p - 1/2) $$

for normal noise, Laplace noise and uniform noise on $[-\lambda, \lambda]$ (Yang et al., 2020, [Randomized
Smoothing of All Shapes and Sizes](https://arxiv.org/abs/2002.08118)). Scales may differ by pixel: the
smallest counts. For Laplace noise densities differ by a factor $e^{\|\delta\|_1 / \lambda}$ at most, for
uniform noise distributions by $\|\delta\|_1 / 2 \lambda$ in total variation, whatever the other scales.

A ball of another norm that lies within is certified as well: $R_q = R_p\, d^{-\max(0, 1/p - 1/q)}$ for $d$
pixels. So normal noise certifies l1 balls as large as its l2 balls, and l-inf balls $\sqrt d$ times smaller.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from probdefense.types import Norm

SLACK = 1e-12
"""Relative, and more than the quantile functions err in double precision."""


class Shape(NamedTuple):
    """What a family of noise certifies: its norm, and radius and share as functions of each other."""

    norm: Norm
    radius: Callable[[Tensor], Tensor]
    share: Callable[[float], float]


SHAPES = {
    "normal": Shape(2.0, torch.special.ndtri, lambda r: 0.5 * (1 + math.erf(r / math.sqrt(2)))),
    "laplace": Shape(1.0, lambda p: -torch.log(2 * (1 - p)), lambda r: 1 - math.exp(-r) / 2),
    "uniform": Shape(1.0, lambda p: 2 * p - 1, lambda r: 0.5 + r / 2),
}
"""By family of the noise, for scale 1."""


def shrinking(family: str, norm: Norm, size: int) -> float:
    """How much smaller the radius is in a norm than in the family's own, for `size` pixels."""
    return float(size) ** -max(0.0, 1 / SHAPES[family].norm - 1 / norm)


def certified_radius(share: Tensor, family: str, unit: float) -> Tensor:
    """Radii of shares, rounded down, in double precision; 0 at one half and below.

    Args:
        share: Of the votes, double.
        family: A name in `SHAPES`.
        unit: The scale of the noise, times `shrinking`.
    """
    safe = (share * (1 - SLACK)).clamp(0.5, 1 - SLACK)
    return (unit * (1 - SLACK) * SHAPES[family].radius(safe)).clamp_min(0.0)


def enough(radius: float, family: str, unit: float) -> float:
    """The share with which a radius is certain, rounded up."""
    return SHAPES[family].share(radius / unit * (1 + 10 * SLACK)) * (1 + 10 * SLACK)
