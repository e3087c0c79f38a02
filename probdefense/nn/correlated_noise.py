r"""Noise with a trained covariance over channels, shared by positions.

Eustratiadis et al., 2021, [Weight-covariance Alignment for Adversarially Robust Neural
Networks](https://arxiv.org/abs/2010.08852), on the features before the last layer. The latent stays
standard normal and the layer mixes it, so draws, freezing and the KL are those of any other noise.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import linear

from probdefense.nn.noise import Noise
from probdefense.types import Inputs


class CorrelatedNoise(Noise):
    r"""Adds noise that is mixed over channels, $x + L \varepsilon$, with covariance $L L^\top$.

    $L$ is lower triangular, $(C, C)$, or $[\mathrm{diag}(\sigma), F]$ with $F$ of shape $(C, r)$: low rank
    plus diagonal, whose latent has $C + r$ channels. Positions share $L$ and are independent. It starts as
    independent noise of one scale.

    Args:
        scale: $\sigma$ of every channel at the start, in the units of the input of the layer.
        channels: $C$.
        axis: Where the channels are in ``(batch, *event)``: 1 for images, -1 for features.
        rank: $r$, or None for a lower-triangular factor.
        family: Distribution of one element of $\varepsilon$; ``Normal(0, 1)`` by default.
        floor: The smallest diagonal element of $L$.
        multiplicative: Whether the noise multiplies.
        when: ``"always"``, or only in ``"train"`` or only in ``"test"`` mode.

    Raises:
        ValueError: a scale not above its floor.

    Examples:
        >>> layer = CorrelatedNoise(0.5, channels=2, axis=-1)
        >>> _ = torch.nn.init.constant_(layer.factor, 0.25)
        >>> layer.covariance.detach()
        tensor([[0.2500, 0.1250],
                [0.1250, 0.3125]])
    """

    function_settings = (*Noise.function_settings, "axis", "rank")  # type: ignore[assignment]

    def __init__(
        self,
        scale: float,
        channels: int,
        *,
        axis: int,
        rank: int | None = None,
        family: Distribution | None = None,
        floor: float = 0.0,
        multiplicative: bool = False,
        when: Literal["always", "train", "test"] = "always",
    ):
        super().__init__(
            scale,
            family=family,
            learned=True,
            shape=(channels,),
            floor=floor,
            multiplicative=multiplicative,
            when=when,
        )
        self.axis, self.rank = axis, rank
        self.factor = nn.Parameter(torch.zeros(channels, channels if rank is None else rank))

    @property
    def mixing(self) -> Tensor:
        """$L$, of shape ``(channels, latent channels)``."""
        diagonal = torch.diag(super().scale)
        if self.rank is None:
            return diagonal + self.factor.tril(-1)
        return torch.cat([diagonal, self.factor], dim=1)

    @property
    def covariance(self) -> Tensor:
        r"""$L L^\top$ at one position, for a latent of variance 1, ``(channels, channels)``."""
        mixing = self.mixing
        return mixing @ mixing.T

    @property
    def scale(self) -> Tensor:
        """The standard deviation of every channel, for a latent of variance 1, ``(channels,)``."""
        return self.mixing.square().sum(1).sqrt()

    @property
    def log_volume(self) -> Tensor:
        r"""$\tfrac12 \log \det L L^\top$, from the diagonal or from a matrix of $r$ rows."""
        diagonal = super().scale
        if self.rank is None:
            return diagonal.log().sum()
        relative = self.factor / diagonal.unsqueeze(1)
        inner = torch.eye(self.rank, dtype=relative.dtype, device=relative.device) + relative.T @ relative
        return diagonal.log().sum() + torch.linalg.slogdet(inner).logabsdet / 2

    def forward(self, x: Inputs) -> Tensor:
        """``(batch, *event) -> (batch, *event)``."""
        like = self._latent(x)
        eps = self.eps(like)
        if self.when != "always" and (self.when == "train") != self.training:
            return x
        eps = eps.expand(1, *like.shape[1:]) if eps.dim() == 0 else eps
        noise = linear(eps.movedim(self.axis, -1), self.mixing).movedim(-1, self.axis)
        return torch.addcmul(x, noise, x) if self.multiplicative else x + noise

    def _latent(self, x: Inputs) -> Tensor:
        """A tensor of the shape of the latent of `x`, without memory of its own."""
        shape = list(x.shape)
        shape[self.axis] += self.rank or 0
        return x.new_zeros(()).expand(shape)

    def extra_repr(self) -> str:
        kind = "full" if self.rank is None else f"rank {self.rank} plus diagonal"
        spread = float(self.scale.detach().mean()) * float(self.eps.family.stddev)
        return f"std={spread:.4g} (mean), covariance={kind}"
