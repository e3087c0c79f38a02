"""The memory of an adaptive defense: labeled examples, and the nearest of them in feature space."""

import torch
from torch import Tensor, nn

from probdefense.core.defense import Defense
from probdefense.core.sites.weights import removed
from probdefense.nn.passes import input_shapes
from probdefense.progress import track
from probdefense.rng import forked
from probdefense.types import Attack, Inputs, Labels
from probdefense.validation import check_inputs


class Bank:
    """Labeled examples with the features of the static base, and the nearest of them to an input."""

    def __init__(self, defense: Defense, x: Inputs, y: Labels):
        self.defense, self.x, self.y = defense, x, y
        self.layer = _last_linear(defense, x)
        self.features = torch.cat([self._features(part) for part in x.split(512)])

    def nearest(self, x: Inputs, count: int) -> Tensor:
        """Indices of the nearest examples in feature space, nearest first, ``(batch, count)``."""
        rows = [torch.cdist(self._features(part), self.features) for part in x.split(64)]
        return torch.cat([distance.topk(count, largest=False).indices for distance in rows])

    def _features(self, x: Inputs) -> Tensor:
        """What the last linear layer of the static base receives, ``(batch, features)``."""
        seen: list[Tensor] = []
        layer = self.defense.net.get_submodule(self.layer)
        handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(1)))
        try:
            with torch.no_grad():
                self.defense.mean()(x)
        finally:
            handle.remove()
        return seen[-1]


def attacked_copy(defense: Defense, attack: Attack, x: Inputs, y: Labels, seed: int) -> Inputs:
    """An attacked copy of the data; the base's own decisions are attacked, so labels do not leak."""
    with forked(seed, x.device):
        parts = []
        for part in track(x.split(512), "attacked copy"):
            with torch.no_grad():
                decisions = defense.mean()(part)[0].argmax(-1)
            found = attack(defense, part, decisions)
            if not isinstance(found, Tensor) or found.shape != part.shape:
                came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise TypeError(
                    f"expected attack to return points like x, {tuple(part.shape)}, got {came}; fix its "
                    "settings with functools.partial"
                )
            check_inputs(found, "the points of attack")
            parts.append(found.detach())
    return torch.cat(parts)


def _last_linear(defense: Defense, x: Inputs) -> str:
    """The path of the linear layer that runs last: what it receives are the features."""
    net = defense.net
    paths = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    order = list(input_shapes(net, paths, x, removed(defense.sites.values()))) if paths else []
    if not order:
        raise ValueError(
            f"found no linear layer in {type(net).__name__} to take features from; "
            "end the network with nn.Linear"
        )
    return order[-1]
