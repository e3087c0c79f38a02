r"""Dropout whose mask comes from a site, so that it is drawn like every other randomness of a defense.

Gal and Ghahramani, 2016, [Dropout as a Bayesian Approximation](https://arxiv.org/abs/1506.02142).
"""

import pyro.distributions as dist
from torch import Tensor, nn

from probdefense.nn.placeholder import Placeholder
from probdefense.types import Inputs
from probdefense.validation import check_number


class MaskedDropout(nn.Module):
    r"""Multiplies by a mask and rescales, $x\, m / (1 - r)$ with $m \sim \mathrm{Bernoulli}(1 - r)$.

    It stays on in ``eval()``. Unfilled it is the identity.

    Args:
        rate: $r$, the probability of zero.
        per_channel: Whether a channel is dropped as a whole, as in ``nn.Dropout2d``.

    Raises:
        ValueError: a rate outside (0, 1).

    Examples:
        >>> layer = MaskedDropout(0.5)
        >>> torch.func.functional_call(layer, {"mask.value": torch.tensor([[1.0, 0.0]])}, torch.ones(1, 2))
        tensor([[2., 0.]])
    """

    function_settings = ("keep",)

    def __init__(self, rate: float, *, per_channel: bool = False):
        super().__init__()
        rate = check_number("rate", rate)
        if not 0 < rate < 1:
            raise ValueError(f"expected rate in (0, 1), the probability of zero, got {rate}; try 0.1")
        self.keep = 1 - rate
        self.mask = Placeholder(dist.Bernoulli(self.keep), neutral=self.keep, axes=1 if per_channel else None)

    def forward(self, x: Inputs) -> Tensor:
        """``(batch, *event) -> (batch, *event)``."""
        return x * (self.mask(x) / self.keep)

    def extra_repr(self) -> str:
        return f"rate={1 - self.keep:g}"
