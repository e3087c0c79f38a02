"""An objective as a module, for what wraps modules: compilation and distributed training."""

from typing import Any

from torch import Tensor, nn

from probdefense.objectives.elbo import elbo
from probdefense.types import Inputs, Labels, Objective
from probdefense.validation import check_objective


class LossModule(nn.Module):
    """A module whose forward is the objective: what to compile, or to wrap for distributed training.

    ``DistributedDataParallel(LossModule(defense, objective))`` synchronizes gradients; wrapping the
    defense and calling the objective on it would not, without an error.

    Args:
        defense: A `Defense`.
        objective: ``objective(defense, x, y) -> scalar``.

    Examples:
        >>> import probdefense as pd
        >>> loss = LossModule(pd.deterministic(torch.nn.Linear(4, 3)), elbo)
        >>> loss(torch.rand(8, 4), torch.zeros(8).long()).requires_grad
        True
    """

    def __init__(self, defense: nn.Module, objective: Objective = elbo):
        super().__init__()
        if not callable(getattr(defense, "step", None)):
            raise TypeError(
                f"expected a Defense, got {type(defense).__name__}; wrap a plain network with "
                "probdefense.deterministic(net)"
            )
        check_objective(objective)
        self.defense, self.objective = defense, objective

    def forward(self, x: Inputs, y: Labels, **options: Any) -> Tensor:
        """The objective, a scalar in nats per example."""
        return self.objective(self.defense, x, y, **options)
