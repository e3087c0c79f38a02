r"""Noise for some of the filters of a convolution, with a trained scale per weight between two bounds."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from probdefense.ops import bounded, unbounded


class FilterNoise(nn.Module):
    r"""Adds $\sigma \odot \eta$ to the chosen filters of a weight, $\sigma \in [a, b]$ trained per element.

    Args:
        channels: The filters (first axis of the weight) that are random.
        shape: Of one filter.
        scale: Where every $\sigma$ starts.
        floor: $a$.
        ceiling: $b$.

    Examples:
        >>> layer = FilterNoise([1], (1,), 0.5, 0.1, 1.0)
        >>> layer(torch.zeros(2, 1), torch.tensor([[2.0]])).detach()
        tensor([[0.],
                [1.]])
    """

    index: Tensor
    noise_coefficients = True  # no weight decay on these parameters, and no prior by default
    function_settings = ("channels", "floor", "ceiling")

    def __init__(
        self, channels: Sequence[int], shape: tuple[int, ...], scale: float, floor: float, ceiling: float
    ):
        super().__init__()
        self.channels, self.floor, self.ceiling = list(channels), floor, ceiling
        start = unbounded(scale, floor, ceiling)
        self.log_scale = nn.Parameter(torch.full((len(self.channels), *shape), start))
        self.register_buffer("index", torch.tensor(self.channels), persistent=False)

    @property
    def scale(self) -> Tensor:
        """The current scales, ``(filters, *shape)``."""
        return bounded(self.log_scale, self.floor, self.ceiling)

    def forward(self, weight: Tensor, eta: Tensor) -> Tensor:
        """The weight with noise on its random filters, of the shape of the weight."""
        return weight.index_add(0, self.index, self.scale * eta)
