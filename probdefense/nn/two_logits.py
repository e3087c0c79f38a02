"""A network with one logit as a network with two classes."""

import torch
from torch import Tensor, nn

from probdefense.types import Inputs
from probdefense.validation import check_kind


class TwoLogits(nn.Module):
    r"""Answers $(0, z)$ where a network answers $z$, so that $p(y = 1) = \mathrm{sigmoid}(z)$.

    A softmax over one logit is always sure; over these two it is the sigmoid.

    Args:
        net: A network ``(batch, *event) -> (batch, 1)`` or ``(batch,)``.

    Raises:
        ValueError: in the first pass, a network with another number of logits.

    Examples:
        >>> TwoLogits(torch.nn.Linear(4, 1))(torch.rand(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        check_kind("net", net, nn.Module, "write the network as a module")
        self.net = net

    def forward(self, x: Inputs) -> Tensor:
        """``(batch, *event) -> (batch, 2)``."""
        z = self.net(x)
        if z.numel() != len(x):
            raise ValueError(
                f"expected one logit per example, ({len(x)}, 1), got {tuple(z.shape)}; several need no "
                "adapter"
            )
        z = z.reshape(-1, 1)
        return torch.cat([torch.zeros_like(z), z], dim=1)
