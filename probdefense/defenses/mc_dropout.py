r"""Dropout that stays on at test: an ensemble of sub-networks.

Gal and Ghahramani, 2016, [Dropout as a Bayesian Approximation](https://arxiv.org/abs/1506.02142). Training
with dropout is variational inference with Bernoulli gates, $m \sim \mathrm{Bernoulli}(1 - r)$, whose KL is
weight decay; the prediction averages the probabilities of many masks.
"""

from torch import nn

from probdefense.core.defense import Defense
from probdefense.defenses.host import device_and_dtype, host
from probdefense.nn.dropout import MaskedDropout
from probdefense.nn.surgery import insert_after, insert_before, matching

ELEMENTS = (nn.Dropout,)
CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def mc_dropout(net: nn.Module, *, rate: float, num_data: int | None = None) -> Defense:
    r"""Makes dropout a part of the model: one mask per example and draw, in training and at test.

    Where the network has Dropout modules, each becomes a site and its own rate is replaced; where it
    has none, masks come before every linear layer. The mask is a discrete site, so Pyro trains it
    with ``Trace_ELBO``. The KL of the paper is ``defense.param_groups(weight_decay)``.

    Args:
        net: A network or a `Defense`; it is copied, parameters keep their names.
        rate: $r$, the probability of zero, in (0, 1).
        num_data: Size of the training set; not needed, as the masks have no KL.

    Returns:
        A `Defense` whose sites are named after the layers.

    Raises:
        ValueError: a rate outside (0, 1), or neither Dropout nor linear layers.

    References:
        Gal and Ghahramani, 2016, [Dropout as a Bayesian Approximation](https://arxiv.org/abs/1506.02142)

    Examples:
        >>> import probdefense as pd
        >>> list(mc_dropout(pd.models.small_cnn(), rate=0.3).sites)
        ['6.dropout', '8.dropout']
    """
    net, sites, num_data = host(net, num_data)
    layers = list(matching(net, (*ELEMENTS, *CHANNELS)))
    linear = list(matching(net, (nn.Linear,)))
    if not layers and not linear:
        raise ValueError(
            f"found nowhere to drop in {type(net).__name__}; looked for Dropout modules and Linear layers"
        )
    like = device_and_dtype(net)
    for _, layer in layers:
        layer.p = 0.0  # type: ignore[assignment]  # the mask behind it takes over
        mask = MaskedDropout(rate, per_channel=isinstance(layer, CHANNELS))
        insert_after(layer, "dropout", mask.to(like))
    for _, layer in [] if layers else linear:
        insert_before(layer, "dropout", MaskedDropout(rate).to(like))
    return Defense.from_sites(net, sites, num_data)
