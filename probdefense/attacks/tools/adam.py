r"""Adam's step for points that are optimized together but must not depend on each other.

Kingma and Ba, 2015, [Adam](https://arxiv.org/abs/1412.6980). Every element counts its own steps,
because coordinate-wise attacks move a few elements at a time.
"""

import torch
from torch import Tensor


class Adam:
    r"""The direction $\hat m / (\sqrt{\hat v} + 10^{-8})$ of every element, of size about 1.

    Args:
        like: A tensor of the shape of the points.

    Examples:
        >>> Adam(torch.zeros(2)).step(torch.tensor([3.0, -0.5])).round()
        tensor([ 1., -1.])
    """

    def __init__(self, like: Tensor):
        self.mean, self.square, self.count = (torch.zeros_like(like) for _ in range(3))

    def step(self, gradient: Tensor, moved: Tensor | None = None) -> Tensor:
        """The next direction; with `moved` (bool), zero elsewhere, where nothing is remembered."""
        moved = torch.ones_like(gradient, dtype=torch.bool) if moved is None else moved
        self.count = self.count + moved
        self.mean = torch.where(moved, 0.9 * self.mean + 0.1 * gradient, self.mean)
        self.square = torch.where(moved, 0.999 * self.square + 0.001 * gradient.square(), self.square)
        mean = self.mean / (1 - 0.9**self.count).clamp_min(0.1)
        size = (self.square / (1 - 0.999**self.count).clamp_min(0.001)).sqrt() + 1e-8
        return (mean / size).masked_fill(~moved, 0.0)
