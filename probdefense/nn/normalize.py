"""Mean and standard deviation inside the network, so that the world outside stays in pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from probdefense.types import Inputs
from probdefense.validation import check_number


class Normalize(nn.Module):
    r"""Standardizes every channel, $(x - \mu_c) / \sigma_c$.

    Put it first in the network: attacks, noise and certificates then speak of pixels in [0, 1].

    Args:
        mean: One value per channel.
        std: One positive value per channel.

    Raises:
        ValueError: lengths differ or a standard deviation is not positive.

    Examples:
        >>> Normalize([0.5], [0.25])(torch.ones(1, 1, 2, 2)).flatten()
        tensor([2., 2., 2., 2.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        mean, std = (
            [check_number(name, value) for value in values]
            for name, values in (("every mean", mean), ("every std", std))
        )
        if len(mean) != len(std) or not std or min(std) <= 0:
            raise ValueError(
                f"expected one mean and one positive std per channel, got mean={mean}, std={std}; in pixels "
                "of [0, 1]"
            )
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.get_default_dtype()))
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.get_default_dtype()))

    def forward(self, x: Inputs) -> Tensor:
        """``(batch, channels, *rest) -> (batch, channels, *rest)``."""
        shape = (-1, *[1] * (x.dim() - 2))
        return (x - self.mean.view(shape)) / self.std.view(shape)

    def extra_repr(self) -> str:
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"
