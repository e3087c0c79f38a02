"""Running statistics of normalization layers, taken anew under the posterior."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def recalibrate(defense: Any, loader: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Replaces the running statistics of BatchNorm by their average over data and draws.

    Each batch is seen through one draw. Statistics that training left behind belong to weights that
    kept moving; after a change of scale, prior or threshold they belong to another network.

    Args:
        defense: A `Defense`; changed in place, modes are left as they are.
        loader: Batches ``(x, y)``; labels are not used.

    Raises:
        ValueError: no layer with running statistics.

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
        raise ValueError("found no normalization layer with running statistics in the defense")
    before = [(layer, layer.momentum, layer.training) for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum, layer.training = None, True  # None: the plain average over batches
        for x, _ in loader:
            defense.move_statistics(x.to(next(layers[0].buffers()).device))
    finally:
        for layer, momentum, training in before:
            layer.momentum, layer.training = momentum, training
