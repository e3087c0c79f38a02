r"""Noise on features whose mean and scale depend on the input.

Yu et al., 2021, [Simple and Effective Stochastic Neural
Networks](https://ojs.aaai.org/index.php/AAAI/article/view/16436) (SE-SNN). A small network gives the
distribution of an activation for each input, $h + m(h) + s(h)\, \varepsilon$, and training rewards its
entropy: ``rewarded(elbo, weight, reward=entropy)``.
"""

from torch import nn

from probdefense.core.defense import Defense
from probdefense.core.registry import builder
from probdefense.defenses.host import channels_of, device_and_dtype, host, last_linear
from probdefense.nn.conditional_noise import ConditionalNoise
from probdefense.nn.surgery import insert_before
from probdefense.types import Inputs
from probdefense.validation import check_count

SCALE = 0.1
"""Of the noise at the start, in units of the features."""


@builder
def conditional_noise(
    net: nn.Module,
    layer: str | None = None,
    *,
    hidden: int = 16,
    num_data: int | None = None,
    example: Inputs | None = None,
) -> Defense:
    r"""Adds noise of amortized mean and scale to what a layer receives, $h + m(h) + s(h)\, \varepsilon$.

    The latent is standard normal in model and guide, so there is no KL and a frozen draw is the same
    function for any batch. An attack differentiates $m$ and $s$ too, and may look for inputs with little
    noise: the scale is no property of the defense, so there is no certificate. What an attack over fresh
    draws leaves is open; no code of its authors was found.

    Args:
        net: A network or a `Defense`; it is copied, parameters keep their names.
        layer: The path of the layer whose input gets noise; by default the linear layer that runs last, in
            every member of an ensemble.
        hidden: Width of the network that gives mean and scale.
        num_data: Size of the training set; not needed, as the noise has no KL.
        example: A batch of inputs, to see which layers run; needed where that cannot be guessed.

    Returns:
        A `Defense` with the site ``"<layer>.noise"``.

    Raises:
        ValueError: no linear layer, no layer of that path, one that never runs, or `hidden` below 1.

    References:
        Yu et al., 2021, [Simple and Effective Stochastic Neural
        Networks](https://ojs.aaai.org/index.php/AAAI/article/view/16436)

    Examples:
        >>> import probdefense as pd
        >>> list(conditional_noise(pd.models.small_cnn()).sites)
        ['8.noise']
    """
    hidden = check_count("hidden", hidden)
    net, sites, num_data = host(net, num_data)
    like = device_and_dtype(net, sites)
    for place in last_linear(net, sites, layer, example):
        channels, axis = channels_of(place.module, place.event)
        insert_before(
            place.module, "noise", ConditionalNoise(channels, hidden=hidden, scale=SCALE, axis=axis).to(like)
        )
    return Defense.from_sites(net, sites, num_data)
