"""Noise on parameters that stay trained in the network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from probdefense.core.sites.site import EMPTY, join
from probdefense.core.sites.weights import WeightSite


@dataclass(frozen=True, eq=False)
class WeightNoiseSite(WeightSite):
    """Standard noise for parameters that stay trained in the network; `layer` beside each scales it."""

    layer: str = ""

    perturbs = True

    def fill(self, value: Tensor, net: nn.Module, given: Mapping[str, Tensor] = EMPTY) -> dict[str, Tensor]:
        filled: dict[str, Tensor] = {}
        for names, eps in zip(self.names, self.views(value).values(), strict=True):
            layer = join(names[0].rpartition(".")[0], self.layer)
            coefficients: dict[
                str, Tensor
            ] = {  # those that have become random are None in the layer, and given
                name: given.get(f"{layer}.{name}", parameter)  # type: ignore[arg-type]
                for name, parameter in net.get_submodule(layer)._parameters.items()
            }
            weight = given[names[0]] if names[0] in given else _tensor(net, names[0])
            noisy = functional_call(net.get_submodule(layer), coefficients, (weight, eps))
            filled |= dict.fromkeys(names, noisy)
        return filled

    def random_rows(self, net: nn.Module) -> dict[str, list[int]]:
        found = {}
        for names in self.names:
            layer: Any = net.get_submodule(join(names[0].rpartition(".")[0], self.layer))
            if hasattr(layer, "channels") and _tensor(net, names[0]) is not None:
                found[names[0]] = list(layer.channels)
        return found


def _tensor(net: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    return getattr(net.get_submodule(path), attribute)
