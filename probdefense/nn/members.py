"""Several networks as one: a buffer says which of them answers."""

import torch
from torch import Tensor, nn

from probdefense.ops import log_mean_exp
from probdefense.types import Inputs

ALL = -1
"""The choice that stands for the whole ensemble."""


class Members(nn.Module):
    r"""Answers as the member that ``member`` names, or, unfilled, as $\log \frac1K \sum_k p_k(y|x)$.

    Args:
        nets: The networks, with one number of classes.

    Examples:
        >>> pair = Members([torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)])
        >>> pair(torch.rand(2, 4)).shape
        torch.Size([2, 3])
    """

    member: Tensor | None

    def __init__(self, nets: list[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(nets)
        self.num_classes: int | None = None
        self.register_buffer("member", None, persistent=False)

    def forward(self, x: Inputs) -> Tensor:
        """Logits, ``(batch, *event) -> (batch, classes)``; log-probabilities of the whole ensemble.

        Raises:
            ValueError: members with different classes.
        """
        member = ALL if self.member is None else int(self.member)
        if member != ALL:
            return self._answer(member, x)
        answers = [self._answer(k, x).log_softmax(-1) for k in range(len(self.members))]
        return log_mean_exp(torch.stack(answers))

    def _answer(self, member: int, x: Inputs) -> Tensor:
        logits = self.members[member](x)
        self.num_classes = self.num_classes or logits.shape[-1]
        if logits.shape[-1] != self.num_classes:
            raise ValueError(
                f"expected members with one number of classes, got {self.num_classes} and "
                f"{logits.shape[-1]} (member {member})"
            )
        return logits
