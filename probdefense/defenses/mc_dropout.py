r"""Dropout that stays on at test: an ensemble of sub-networks.

Gal and Ghahramani, 2016, [Dropout as a Bayesian Approximation](https://arxiv.org/abs/1506.02142). Training
with dropout is variational inference with Bernoulli gates, $m \sim \mathrm{Bernoulli}(1 - r)$, whose KL is
weight decay; the prediction averages the probabilities of many masks.
"""

import warnings

from torch import nn

from probdefense.core.defense import Defense
from probdefense.core.registry import builder
from probdefense.core.sites import Site, removed
from probdefense.defenses.host import device_and_dtype, host, running
from probdefense.nn.dropout import MaskedDropout
from probdefense.nn.randomness import random_in_training
from probdefense.nn.surgery import insert_after, insert_before, matching
from probdefense.types import Inputs

ELEMENTS = (nn.Dropout,)
CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@builder
def mc_dropout(
    net: nn.Module, *, rate: float, num_data: int | None = None, example: Inputs | None = None
) -> Defense:
    r"""Makes dropout a part of the model: one mask per example and draw, in training and at test.

    Where the network has Dropout modules, each becomes a site and its own rate is replaced; where it
    has none, masks come before every linear layer. The mask is a discrete site, so Pyro trains it
    with ``Trace_ELBO``. The KL of the paper is ``defense.param_groups(weight_decay)``. A warning names
    dropout that is not a module (inside ``nn.LSTM``, attention, a forward method): it is out of reach,
    acts in training alone and stands still at test.

    Args:
        net: A network or a `Defense`; it is copied, parameters keep their names.
        rate: $r$, the probability of zero, in (0, 1).
        num_data: Size of the training set; not needed, as the masks have no KL.
        example: A batch of inputs, to see which layers run; needed where that cannot be guessed.

    Returns:
        A `Defense` whose sites are named after the layers.

    Raises:
        ValueError: a rate outside (0, 1), or neither Dropout nor linear layers that run.

    References:
        Gal and Ghahramani, 2016, [Dropout as a Bayesian Approximation](https://arxiv.org/abs/1506.02142)

    Examples:
        >>> import probdefense as pd
        >>> list(mc_dropout(pd.models.small_cnn(), rate=0.3).sites)
        ['6.dropout', '8.dropout']
    """
    net, sites, num_data = host(net, num_data)
    layers = dict(matching(net, (*ELEMENTS, *CHANNELS)))
    places = layers or dict(matching(net, (nn.Linear,)))
    seen = running(net, sites, places, example, asked=False)
    if not seen.shapes:
        raise ValueError(
            f"expected layers, found nowhere to drop in {type(net).__name__}; looked for Dropout modules and "
            "Linear layers that run; give it one"
        )
    like = device_and_dtype(net, sites)
    for path in filter(seen.shapes.__contains__, places):
        layer = places[path]
        mask = MaskedDropout(rate, per_channel=isinstance(layer, CHANNELS)).to(like)
        if layers:
            layer.p = 0.0  # type: ignore[assignment]  # the mask behind it takes over
            insert_after(layer, "dropout", mask)
        else:
            insert_before(layer, "dropout", mask)
    if seen.x is not None:
        _warn_of_others(net, sites, seen.x)
    return Defense.from_sites(net, sites, num_data)


def _warn_of_others(net: nn.Module, sites: list[Site], x: Inputs) -> None:
    if others := random_in_training(net, x, removed(sites)):
        warnings.warn(
            f"mc_dropout cannot reach what is drawn inside {', '.join(others)}: it acts in training alone "
            "and stands still in attacks and predictions; only nn.Dropout modules become part of the defense",
            stacklevel=4,
        )
