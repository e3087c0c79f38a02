r"""Weight-covariance alignment: correlated noise on the features that the last layer reads.

Eustratiadis et al., 2021, [Weight-covariance Alignment for Adversarially Robust Neural
Networks](https://arxiv.org/abs/2010.08852). The features get $h + L \varepsilon$ with a trained
lower-triangular $L$, and training rewards noise along the weights of the classes, without any attack:
``rewarded(elbo, weight, reward=alignment)``. Without the reward $L$ collapses.
"""

from torch import nn

from probdefense.core.defense import Defense
from probdefense.core.registry import builder
from probdefense.defenses.host import channels_of, device_and_dtype, host, last_linear
from probdefense.nn.correlated_noise import CorrelatedNoise
from probdefense.nn.surgery import insert_before
from probdefense.types import Inputs

SCALE = 0.1
"""Of every feature at the start; the released code starts with a random triangle of numbers in [0, 1]."""


@builder
def wca(
    net: nn.Module,
    layer: str | None = None,
    *,
    num_data: int | None = None,
    example: Inputs | None = None,
) -> Defense:
    r"""Adds noise of a full trained covariance to what the last linear layer receives, $h + L \varepsilon$.

    The latent $\varepsilon \sim N(0, I)$ is drawn for every example; the paper's code draws one per batch, so
    that an average over 30 copies of an image in one batch is an average over one draw. It has 32
    features; how wide $L$ may be, and what an attack over fresh draws leaves, the paper does not say.

    Args:
        net: A network or a `Defense`; it is copied, parameters keep their names.
        layer: The path of the layer whose input gets noise; by default the linear layer that runs last, in
            every member of an ensemble. Of a feature map the covariance is over channels.
        num_data: Size of the training set; not needed, as the noise has no KL.
        example: A batch of inputs, to see which layers run; needed where that cannot be guessed.

    Returns:
        A `Defense` with the site ``"<layer>.noise"``.

    Raises:
        ValueError: no linear layer, no layer of that path, or one that never runs.

    References:
        Eustratiadis et al., 2021, [Weight-covariance Alignment for Adversarially Robust Neural
        Networks](https://arxiv.org/abs/2010.08852)

    Examples:
        >>> import probdefense as pd
        >>> list(wca(pd.models.small_cnn()).sites)
        ['8.noise']
    """
    net, sites, num_data = host(net, num_data)
    like = device_and_dtype(net, sites)
    for place in last_linear(net, sites, layer, example):
        channels, axis = channels_of(place.module, place.event)
        insert_before(place.module, "noise", CorrelatedNoise(SCALE, channels, axis=axis).to(like))
    return Defense.from_sites(net, sites, num_data)
