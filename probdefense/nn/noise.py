r"""Noise on activations, non-centered: the layer scales a standard value that a site supplies.

Liu et al., 2018, [Towards Robust Neural Networks via Random Self-ensemble](https://arxiv.org/abs/1712.00673).
With the hole unfilled the layer is the identity, so the network without draws is the static base.
"""

from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from probdefense.nn.placeholder import Placeholder
from probdefense.types import Inputs


class Noise(nn.Module):
    r"""Adds scaled noise, $x + \sigma \varepsilon$, or multiplies by it, $x (1 + \sigma \varepsilon)$.

    $\varepsilon$ comes from the standard `family`, one value per element and example, drawn by the
    defense and never by the layer. It stays on in ``eval()``: noise is part of the model.

    Args:
        scale: $\sigma$, in the units of the input of the layer (pixels for the first layer).
        family: Continuous distribution of one element of $\varepsilon$; ``Normal(0, 1)`` by default.
        learned: Whether $\sigma$ is trained, as ``floor + exp(log_scale)``.
        shape: Shape of $\sigma$ without the batch axis: ``()``, ``(channels, 1, 1)`` or the event.
        floor: The smallest value that a learned $\sigma$ can take.
        multiplicative: Whether the noise multiplies.
        when: ``"always"``, or only in ``"train"`` or only in ``"test"`` mode.

    Raises:
        ValueError: a negative scale, a learned scale not above its floor, or a discrete family, which
            would add to the pixels or double them where a mask was meant.

    Examples:
        >>> layer = Noise(0.5)
        >>> torch.func.functional_call(layer, {"eps.value": torch.ones(1, 2)}, torch.zeros(1, 2))
        tensor([[0.5000, 0.5000]])
    """

    noise_coefficients = True  # no weight decay on these parameters, and no prior by default

    function_settings = ("floor", "multiplicative", "when")

    def __init__(
        self,
        scale: float = 0.1,
        *,
        family: Distribution | None = None,
        learned: bool = False,
        shape: tuple[int, ...] = (),
        floor: float = 0.0,
        multiplicative: bool = False,
        when: Literal["always", "train", "test"] = "always",
    ):
        super().__init__()
        if scale < 0 or floor < 0 or (learned and scale <= floor):
            raise ValueError(
                f"expected scale >= 0, and above the floor when learned, got scale={scale}, floor={floor}; "
                "raise the scale"
            )
        if not isinstance(when, str) or when not in ("always", "train", "test"):
            raise ValueError(f"expected when to be 'always', 'train' or 'test', got {when!r}; choose one")
        if family is not None and getattr(family.support, "is_discrete", False):
            raise ValueError(
                f"expected a continuous family, got {family}: noise is x + scale * eps or x * (1 + scale * "
                "eps), which is no mask; take probdefense.nn.MaskedDropout(rate) for one"
            )
        self.eps = Placeholder(family if family is not None else dist.Normal(0.0, 1.0))
        self.floor, self.multiplicative, self.when = floor, multiplicative, when
        if learned:
            self.log_scale = nn.Parameter(torch.full(shape, scale - floor).log())
        else:
            self.register_buffer("fixed_scale", torch.full(shape, float(scale)))

    @property
    def learned(self) -> bool:
        """Whether the scale is a trained parameter."""
        return "log_scale" in self._parameters

    @property
    def scale(self) -> Tensor:
        """The current scale, broadcastable against one example."""
        if self.learned:
            return self.floor + self.log_scale.exp()
        return self.fixed_scale  # type: ignore[return-value]

    def forward(self, x: Inputs) -> Tensor:
        """``(batch, *event) -> (batch, *event)``."""
        eps = self.eps(x)
        if self.when != "always" and (self.when == "train") != self.training:
            return x
        return torch.addcmul(x, self.scale, eps * x if self.multiplicative else eps)

    def extra_repr(self) -> str:
        scale = self.scale.detach() * self.eps.family.stddev
        value = f"{float(scale):.4g}" if scale.dim() == 0 else f"{float(scale.mean()):.4g} (mean)"
        return f"std={value}, learned={self.learned}"
