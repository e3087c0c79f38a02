"""What every builder starts from: a copy of the network and of its sites, and which of its layers run."""

import copy
import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from probdefense.core.defense import Defense
from probdefense.core.sites import Site, join, removed
from probdefense.nn.members import Members
from probdefense.nn.passes import held_still, input_shapes, inputs_seen, run_on_nothing, run_on_zeros
from probdefense.nn.relus import FUNCTIONAL, Where, relu_paths
from probdefense.nn.surgery import insert_after
from probdefense.types import Inputs
from probdefense.validation import check_kind

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Shapes = dict[str, torch.Size | None]

SIZES = (32, 28, 224, 64, 96, 128, 256, 299, *range(1, 64))
"""Image sizes that a network is tried on where no example says which it takes."""


class Host(NamedTuple):
    """A copy to work on: the network, its sites so far, and the size of the data set."""

    net: nn.Module
    sites: list[Site]
    num_data: int | None


class Layer(NamedTuple):
    """A layer of a network, and the event shape that it receives."""

    path: str
    module: nn.Module
    event: torch.Size


class Running(NamedTuple):
    """Which layers run, with the event shape that each receives, in order, and an input that fits."""

    shapes: dict[str, torch.Size]
    x: Inputs | None


def host(net_or_defense: nn.Module, num_data: int | None) -> Host:
    """Copies a plain network, or a defense made of sites, so that the original stays as it is.

    Raises:
        TypeError: not a module, a defense of a user's own model and guide, or a network in replicas.
        ValueError: two different data-set sizes.
    """
    if not isinstance(net_or_defense, nn.Module):
        raise TypeError(
            f"expected an nn.Module or a Defense, got {type(net_or_defense).__name__}; write the network as "
            "a "
            "module"
        )
    refuse_replicas(net_or_defense)
    if not isinstance(net_or_defense, Defense):
        return Host(copied(net_or_defense), [], num_data)
    if not hasattr(net_or_defense.model, "sites"):
        raise TypeError(
            "expected a network or a Defense made by a builder, got a Defense of your own model and "
            "guide; add the noise or the weights to that model instead"
        )
    known = net_or_defense.num_data
    if num_data is not None and known is not None and num_data != known:
        raise ValueError(f"expected num_data={known}, as in the given Defense, got {num_data}; leave it out")
    twin = copy.deepcopy(net_or_defense)
    return Host(twin.net, list(twin.sites.values()), num_data if num_data is not None else known)


def copied(net: nn.Module) -> nn.Module:
    """A copy of a network.

    Raises:
        ValueError: a network that cannot be copied.
    """
    try:
        return copy.deepcopy(net)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"expected a network that can be copied, got {type(net).__name__}, of which torch says: "
            f"{str(error).split('.')[0]}; where its weights are computed by torch.nn.utils.weight_norm or "
            "spectral_norm, use those of torch.nn.utils.parametrizations"
        ) from error


def refuse_replicas(net: nn.Module) -> None:
    """Refuses a network that copies itself to devices: draws are filled into one copy.

    Raises:
        TypeError: naming where.
    """
    for path, module in net.named_modules():
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            where = f"at {path!r} " if path else ""
            raise TypeError(
                f"expected a plain network, got {type(module).__name__} {where}around one; build from its "
                ".module, and train the defense on several devices with "
                "DistributedDataParallel(objectives.LossModule(defense, objective))"
            )


def running(
    net: nn.Module, sites: list[Site], paths: Collection[str], example: Inputs | None, *, asked: bool
) -> Running:
    """The layers of `paths` whose forward runs in evaluation mode.

    Args:
        net: The network.
        sites: Its sites, for the parameters that it lacks.
        paths: Where a builder wants to put something.
        example: A batch of inputs; without one, inputs are guessed from the first layers.
        asked: Whether the caller chose these layers by name, so that none may be missing.

    Raises:
        ValueError: a layer that was asked for never runs, or no guess fits.
    """
    given = removed(sites)
    met, x = _guessed(net, paths, given) if example is None else _shown(net, paths, example, given)
    idle = [path for path in paths if path not in met]
    if idle and asked:
        raise ValueError(
            f"{', '.join(path or type(net).__name__ for path in idle)} never runs in evaluation mode (a "
            "module around it reads its weights, or passes it by), so nothing put there would act; "
            "choose layers that run"
        )
    for path, shape in met.items():
        if shape is None:
            raise ValueError(f"the first input of {path!r} is not a tensor; choose another layer with where=")
    return Running(met, x)  # type: ignore[arg-type]


def output_shapes(
    net: nn.Module, sites: list[Site], paths: Collection[str], example: Inputs | None, *, asked: bool
) -> Running:
    """As `running`, with the event shape that each layer returns."""
    twin = copy.deepcopy(net)
    probes = {
        join(path, insert_after(twin.get_submodule(path), "probe", nn.Identity())): path for path in paths
    }
    seen = running(twin, sites, probes, example, asked=asked)
    return Running({probes[name]: shape for name, shape in seen.shapes.items()}, seen.x)


def last_linear(net: nn.Module, sites: list[Site], layer: str | None, example: Inputs | None) -> list[Layer]:
    """A layer by path, or the linear layer that runs last; of an ensemble that of every member.

    Raises:
        ValueError: no such layer, or one that never runs.
    """
    if layer is not None:
        check_kind("layer", layer, str, "give the path of a layer, as net.named_modules() has it")
    modules = dict(net.named_modules())
    found = [
        path
        for path, module in modules.items()
        if (isinstance(module, nn.Linear) if layer is None else layer in (path, _within(net, path)[1]))
    ]
    if not found:
        wanted = "a linear layer" if layer is None else f"a layer at {layer!r}"
        raise ValueError(
            f"expected {wanted} in {type(net).__name__}, found none; known: "
            f"{', '.join(path for path in modules if path) or 'no layers'}; name one with layer="
        )
    met = running(net, sites, found, example, asked=layer is not None).shapes
    if not met:
        raise ValueError(
            f"{', '.join(found)} never runs in evaluation mode; name a layer that runs with layer="
        )
    last = {_within(net, path)[0]: Layer(path, modules[path], event) for path, event in met.items()}
    return list(last.values())


def _within(net: nn.Module, path: str) -> tuple[str, str]:
    """The member of an ensemble that a path is in, and the path there."""
    if not isinstance(net, Members):
        return "", path
    _, _, inside = path.partition(".")
    member, _, name = inside.partition(".")
    return member, name


def running_relus(
    net: nn.Module,
    sites: list[Site],
    example: Inputs | None,
    where: Where | None = None,
    paths: Collection[str] | None = None,
) -> list[str]:
    """The ReLUs of a network that run, as paths; chosen by `where` or `paths` they all must.

    Raises:
        ValueError: no ReLU, or one that was chosen never runs, or no guess fits.
    """
    found = relu_paths(net, where, paths)
    asked = where is not None or paths is not None
    runs = running(net, sites, found, example, asked=asked).shapes
    return [path for path in found if path in runs] or found[-1:]  # refused when it runs, if function calls


def _shown(
    net: nn.Module, paths: Collection[str], example: Inputs, given: dict[str, Tensor]
) -> tuple[Shapes, Inputs]:
    if not isinstance(example, Tensor) or example.dim() < 1 or len(example) == 0:
        raise ValueError(
            f"expected example as a batch of inputs (batch, *event), got {type(example).__name__}; pass a "
            "tensor as the network takes it"
        )
    try:
        return input_shapes(net, list(paths), example, given), example[:1]
    except Exception as error:  # whatever the network says to an input that it cannot take
        raise ValueError(
            f"the network cannot run on example= of shape {tuple(example.shape)}; pass a batch of inputs as "
            f"it takes them ({type(error).__name__}: {error})"
        ) from error


def _guessed(
    net: nn.Module, paths: Collection[str], given: dict[str, Tensor]
) -> tuple[Shapes, Inputs | None]:
    """As seen by the first guess that the network takes, else one that has all layers run before it fails."""
    guesses, enough = list(_guesses(net, paths)), None
    tries = [(run, x) for run in (run_on_nothing, run_on_zeros) for x in guesses]
    for run, x in tries:
        with inputs_seen(net, paths) as met, torch.no_grad(), held_still(net):
            try:
                run(net, x, given)
            except Exception:  # a wrong guess, or a network that takes no empty batch
                enough = met if len(met) == len(paths) and enough is None else enough
            else:
                return met, x
    if enough is not None:
        return enough, None
    raise ValueError(
        f"cannot tell from a guessed input which layers of {type(net).__name__} run; pass example=x, a batch "
        "of its inputs"
    )


def _guesses(net: nn.Module, paths: Collection[str]) -> Iterator[Inputs]:
    """Inputs made for the layer registered first, the one chosen first, or the one that takes least."""
    like = device_and_dtype(net)
    layers = [module for module in net.modules() if _events(module)]
    chosen = [net.get_submodule(path) for path in paths if path != FUNCTIONAL]
    least = sorted(layers, key=lambda layer: _events(layer)[0][0])
    columns = [_events(layer) for layer in dict.fromkeys((*layers[:1], *least[:1], *chosen[:1]))]
    for event in dict.fromkeys(filter(None, itertools.chain(*itertools.zip_longest(*columns)))):
        yield like.new_zeros((1, *event))
    if not layers:
        yield like.new_zeros((1, 1))


def _events(layer: nn.Module) -> list[tuple[int, ...]]:
    """Event shapes that a network may take whose first layer this is."""
    if isinstance(layer, CONVOLUTIONS):
        return [(layer.in_channels, *[size] * len(layer.kernel_size)) for size in SIZES]
    if isinstance(layer, nn.RNNBase):
        return [(7, layer.input_size)]
    if isinstance(layer, nn.Linear):
        width = layer.in_features
        sides = [(c, math.isqrt(width // c), math.isqrt(width // c)) for c in (1, 3)]
        return [(width,), (7, width), *(event for event in sides if math.prod(event) == width)]
    return []


def device_and_dtype(net: nn.Module, sites: Iterable[Site] = ()) -> Tensor:
    """A tensor where, and of the kind, that the network computes with, for ``layer.to(...)``."""
    tensors = itertools.chain(net.parameters(), net.buffers(), removed(sites).values())
    return next((t.detach() for t in tensors if t.is_floating_point()), torch.zeros(()))


def channels_of(layer: nn.Module | None, event: torch.Size) -> tuple[int, int]:
    """How many channels a layer receives, and their axis in a batch: 1 of images, -1 of features."""
    images = isinstance(layer, CONVOLUTIONS) or (len(event) > 2 and not isinstance(layer, nn.Linear))
    return (event[0], 1) if images else (event[-1], -1)


def per_channel(layer: nn.Module, side: str = "in") -> tuple[int, ...]:
    """The shape of one value per channel of what a layer receives (``"in"``) or returns (``"out"``)."""
    if isinstance(layer, CONVOLUTIONS):
        return (getattr(layer, f"{side}_channels"), *[1] * len(layer.kernel_size))
    return (getattr(layer, f"{side}_features", 1),)
