r"""The bounded ReLU.

Zantedeschi et al., 2017, [Efficient Defenses Against Adversarial
Attacks](https://arxiv.org/abs/1707.06728): an activation that cannot grow carries a perturbation less far.
"""

from torch import Tensor, nn
from torch.nn.functional import hardtanh

from probdefense.types import Inputs
from probdefense.validation import check_positive


class BReLU(nn.Module):
    r"""Bounds activations on both sides, $f_t(z) = \min(\max(z, 0), t)$.

    Args:
        ceiling: $t$, in units of the activations.

    Raises:
        ValueError: a ceiling that is not positive.

    Examples:
        >>> BReLU(1.0)(torch.tensor([-1.0, 0.5, 2.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """

    function_settings = ("ceiling",)

    def __init__(self, ceiling: float = 1.0):
        super().__init__()
        check_positive("ceiling", ceiling)
        self.ceiling = ceiling

    def forward(self, z: Inputs) -> Tensor:
        """``(batch, *event) -> (batch, *event)``."""
        return hardtanh(z, 0.0, self.ceiling)

    def extra_repr(self) -> str:
        return f"ceiling={self.ceiling:g}"
