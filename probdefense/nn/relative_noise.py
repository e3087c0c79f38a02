r"""Noise in proportion to the standard deviation of what it is added to.

He et al., 2019, [Parametric Noise Injection](https://arxiv.org/abs/1811.09310): $\tilde v = v + \alpha\,
\mathrm{std}(v)\, \eta$ with $\eta \sim N(0, 1)$ and a trained $\alpha$.
"""

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probdefense.nn.placeholder import Placeholder
from probdefense.ops import per_example
from probdefense.types import Inputs


class WeightNoise(nn.Module):
    r"""Noise for a weight, $w + \alpha\, \mathrm{std}(w)\, \eta$; the standard deviation is a constant.

    Args:
        alpha: Where $\alpha$ starts.
        shape: Shape of $\alpha$, broadcastable against the weight.

    Examples:
        >>> weight, eta = torch.tensor([1.0, 3.0]), torch.tensor([1.0, -2.0])
        >>> WeightNoise(0.5)(weight, eta).detach()
        tensor([1.5000, 2.0000])
    """

    noise_coefficients = True  # no weight decay on these parameters, and no prior by default

    def __init__(self, alpha: float, shape: tuple[int, ...] = ()):
        super().__init__()
        self.alpha = nn.Parameter(torch.full(shape, float(alpha)))

    def forward(self, weight: Tensor, eta: Tensor) -> Tensor:
        """The noisy weight, of the shape of the weight."""
        return torch.addcmul(weight, self.alpha * weight.detach().std(correction=0), eta)


class RelativeNoise(nn.Module):
    r"""Noise for activations, $x + \alpha\, \mathrm{std}(x)\, \eta$, with the deviation of each example.

    The deviation is taken over one example, so that an answer does not depend on the rest of the
    batch, and is differentiated, so that an attack sees the whole gradient.

    Args:
        alpha: Where $\alpha$ starts.
        shape: Shape of $\alpha$, broadcastable against one example.
        place: Where the layer stands, for its state; it changes nothing else.

    Examples:
        >>> layer, eta = RelativeNoise(0.5), torch.tensor([[1.0, -2.0]])
        >>> torch.func.functional_call(layer, {"eta.value": eta}, torch.tensor([[1.0, 3.0]])).detach()
        tensor([[1.5000, 2.0000]])
    """

    noise_coefficients = True
    function_settings = ("place",)

    def __init__(self, alpha: float, shape: tuple[int, ...] = (), *, place: str = ""):
        super().__init__()
        self.place = place
        self.alpha = nn.Parameter(torch.full(shape, float(alpha)))
        self.eta = Placeholder(dist.Normal(0.0, 1.0))

    def forward(self, x: Inputs) -> Tensor:
        """``(batch, *event) -> (batch, *event)``."""
        flat = x.flatten(1)
        spread = torch.linalg.vector_norm(flat - flat.mean(1, keepdim=True), dim=1) / flat.shape[1] ** 0.5
        return torch.addcmul(x, self.alpha * per_example(spread, x), self.eta(x))
