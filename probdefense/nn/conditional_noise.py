r"""Noise whose mean and scale are functions of what it is added to.

Yu et al., 2021, [Simple and Effective Stochastic Neural
Networks](https://ojs.aaai.org/index.php/AAAI/article/view/16436): a small network amortizes the distribution
of an activation. Here it is non-centered, $h + m(h) + s(h)\, \varepsilon$, so the latent is standard normal
whatever the input, and freezing it is honest.
"""

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from probdefense.nn.placeholder import Placeholder
from probdefense.types import Inputs


class ConditionalNoise(nn.Module):
    r"""Adds noise of a mean and a scale per example, $h + m(h) + s(h)\, \varepsilon$.

    $m = W_m a$ and $\log s = W_s a$, plus biases, with $a = \mathrm{ReLU}(W h)$ shared by both. At the start
    $m = 0$ and $s$ is about `scale`. Of images the network sees the channels of each position.

    Args:
        channels: How many features, or channels.
        hidden: Width of $a$.
        scale: Where the scale starts, in units of the activations.
        axis: Where the channels are in ``(batch, *event)``: 1 for images, -1 for features.

    Examples:
        >>> layer = ConditionalNoise(2, hidden=4, scale=0.1, axis=-1)
        >>> layer(torch.tensor([[1.0, 2.0]])).detach()
        tensor([[1., 2.]])
    """

    noise_coefficients = True  # no weight decay on these parameters, and no prior by default

    function_settings = ("axis",)

    def __init__(self, channels: int, *, hidden: int, scale: float, axis: int):
        super().__init__()
        self.axis = axis
        generator = torch.Generator().manual_seed(0)  # a layer that is built takes nothing from torch's state
        into, out = (
            torch.randn(shape, generator=generator) for shape in ((hidden, channels), (channels, hidden))
        )
        self.weight = nn.Parameter(into / math.sqrt(channels))
        self.bias = nn.Parameter(torch.full((hidden,), 0.1))
        self.loc_weight = nn.Parameter(torch.zeros(channels, hidden))
        self.loc_bias = nn.Parameter(torch.zeros(channels))
        self.scale_weight = nn.Parameter(0.1 * out / math.sqrt(hidden))
        self.scale_bias = nn.Parameter(torch.full((channels,), math.log(scale)))
        self.eps = Placeholder(dist.Normal(0.0, 1.0))

    def moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of the noise, each of the shape of `h`."""
        hidden = linear(h.movedim(self.axis, -1), self.weight, self.bias).relu()
        loc = linear(hidden, self.loc_weight, self.loc_bias)
        log_scale = linear(hidden, self.scale_weight, self.scale_bias)
        return loc.movedim(-1, self.axis), log_scale.exp().movedim(-1, self.axis)

    def forward(self, h: Inputs) -> Tensor:
        """``(batch, *event) -> (batch, *event)``."""
        loc, scale = self.moments(h)
        return torch.addcmul(h + loc, scale, self.eps(h))
