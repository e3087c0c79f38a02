"""Running statistics of normalization layers, taken anew under the posterior."""

from typing import Any

from torch import nn

from probdefense.nn.passes import explained
from probdefense.training.batches import Batches, batches, check_loader

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def recalibrate(defense: Any, loader: Batches) -> None:
    """Replaces the running statistics of BatchNorm by their average over data and draws.

    Each batch is seen through one draw. Statistics that training left behind belong to weights that
    kept moving; after a change of scale, prior or threshold they belong to another network.

    Args:
        defense: A `Defense`; changed in place, modes are left as they are.
        loader: Batches ``(x, y)``; labels are not used.

    Raises:
        TypeError: something else than batches of tensors.
        ValueError: no layer with running statistics, no batch, or bad data; the statistics stay.

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
    found = [(layer, name, getattr(layer, name).clone()) for layer in layers for name in STATISTICS]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum, layer.training = None, True  # None: the plain average over batches
        for x, _ in batches(loader, next(layers[0].buffers()).device):
            with explained(x):
                defense.move_statistics(x)
    except BaseException:
        for layer, name, value in found:
            getattr(layer, name).copy_(value)
        raise
    finally:
        for layer, momentum, training in before:
            layer.momentum, layer.training = momentum, training
