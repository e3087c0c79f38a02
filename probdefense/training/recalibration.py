r"""Running statistics of normalization layers, taken anew under the posterior.

The average $\hat m$ over $B$ batches errs by $s / \sqrt{B}$, with their spread $s$. Of the old statistics
$m_0$ stays the share that this error has in the distance between the two, per layer (James and Stein, 1961):

$$ m = \hat m + c\, (m_0 - \hat m), \qquad c = \min\Bigl(1, \frac{s^2 / B}{|\hat m - m_0|^2}\Bigr) $$
"""

from typing import Any

import torch
from torch import Tensor, nn

from probdefense.nn.passes import explained
from probdefense.training.batches import Batches, batches, check_loader
from probdefense.types import Inputs

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

Numbers = tuple[Tensor, Tensor, Tensor]
"""Mean, variance and number of batches, as a layer keeps them."""


def recalibrate(defense: Any, loader: Batches) -> None:
    r"""Takes the running statistics of BatchNorm anew: their average over data and draws.

    Each batch is seen through one draw. Statistics that training left behind belong to weights that
    kept moving; after a change of scale, prior or threshold they belong to another network. But few batches
    are few draws of the weights, whose average is worse than what a training left: so the old statistics
    stay to the share that the error of the new ones has in the distance between the two. With much data that
    is next to nothing. A single batch is seen in halves too, which tell its error; of fewer than four
    images it goes half the way. Those of a new layer, which no batch has moved, are replaced.

    Use it after a change of noise, prior or threshold without training, and after an average of weights. Do
    not use it right after `fit` on the same data, where there is nothing to gain, nor with other images than
    the defense will see (attacked or augmented ones): more of them do not help.

    Args:
        defense: A `Defense`; changed in place, modes are left as they are.
        loader: Batches ``(x, y)``; labels are not used.

    Raises:
        TypeError: something else than batches of tensors.
        ValueError: no layer with running statistics, no batch, or bad data; the statistics stay.

    References:
        James and Stein, 1961, [Estimation with Quadratic
        Loss](https://projecteuclid.org/euclid.bsmsp/1200512173)

    Examples:
        >>> import probdefense as pd
        >>> net = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Linear(1, 2))
        >>> defense, x = pd.deterministic(net), torch.tensor([[0.0], [0.5], [1.0]])
        >>> recalibrate(defense, [(x, torch.zeros(3).long())])
        >>> net[0].running_mean, net[0].running_var
        (tensor([0.5000]), tensor([0.2500]))
    """
    kinds = nn.modules.batchnorm._NormBase
    layers = [m for m in defense.modules() if isinstance(m, kinds) and m.track_running_stats]
    if not layers:
        raise ValueError(
            "expected running statistics, found no normalization layer that keeps them; there is nothing to "
            "recalibrate"
        )
    check_loader(loader)
    before = [(layer, layer.momentum, layer.training) for layer in layers]
    old = [_read(layer) for layer in layers]
    found = old
    try:
        for layer in layers:
            layer.momentum, layer.training = None, True  # None: the plain average over uses of the layer
        seen = zip(old, *_seen(defense, layers, loader), strict=True)
        found = [_blended(*each) if each[1] else each[0] for each in seen]
    finally:
        for (layer, momentum, training), numbers in zip(before, found, strict=True):
            layer.momentum, layer.training = momentum, training
            for name, value in zip(STATISTICS, numbers, strict=True):
                getattr(layer, name).copy_(value)


def _read(layer: Any) -> Numbers:
    mean, var, count = (getattr(layer, name).clone() for name in STATISTICS)
    return mean, var, count


def _seen(
    defense: Any, layers: list[Any], loader: Batches
) -> tuple[list[list[Numbers]], list[list[Numbers]]]:
    """What each layer finds in every batch that it runs in, and in parts that tell how it spreads.

    The parts are the batches themselves, or the halves of a single one.
    """
    seen: list[list[Numbers]] = [[] for _ in layers]
    single: Tensor | None = None
    for number, (x, _) in enumerate(batches(loader, next(layers[0].buffers()).device)):
        _see(defense, layers, x, seen)
        single = x if number == 0 else None
    if single is None or len(single) < 4:
        return seen, seen
    halves: list[list[Numbers]] = [[] for _ in layers]
    for half in single.chunk(2):
        _see(defense, layers, half, halves)
    return seen, halves


def _see(defense: Any, layers: list[Any], x: Inputs, seen: list[list[Numbers]]) -> None:
    """Adds what each layer finds in one batch at one draw."""
    for layer in layers:
        layer.reset_running_stats()
    with explained(x):
        defense.move_statistics(x)
    for layer, found in zip(layers, seen, strict=True):
        if int(layer.num_batches_tracked):
            found.append(_read(layer))


def _blended(old: Numbers, seen: list[Numbers], parts: list[Numbers]) -> Numbers:
    """New statistics, with the share of the old ones that they leave room for."""
    means, variances, counts = (torch.stack(part) for part in zip(*seen, strict=True))
    spread = [torch.stack(part) for part in zip(*parts, strict=True)]
    scale = variances.mean(0).clamp_min(torch.finfo(variances.dtype).tiny)
    fresh = not bool(old[0].any()) and bool((old[1] == 1).all())  # as a new layer has them
    mean, var = means.mean(0), variances.mean(0)
    if not fresh:
        mean = _shrunk(mean, spread[0], old[0], scale.sqrt())
        var = _shrunk(var, spread[1], old[1], scale)
    return mean, var, counts.sum()


def _shrunk(new: Tensor, parts: Tensor, old: Tensor, scale: Tensor) -> Tensor:
    """The average over batches, ``(channels,)``, drawn to the old one by the spread of its parts."""
    if len(parts) == 1:
        return (new + old) / 2
    error = (parts.var(0) / len(parts) / scale.square()).sum()
    distance = ((new - old) / scale).square().sum()
    share = torch.where(distance > error, error / distance, 1.0)
    return new + share * (old - new)
