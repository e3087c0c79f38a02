"""Reading trained weights that others saved, in the formats in which they are shared."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from probdefense.core.defense import Defense
from probdefense.core.persistence import check_fit

Net = TypeVar("Net", bound=nn.Module)

HOLDERS = ("state_dict", "model_state_dict", "model", "net", "weights")
"""Under which names a checkpoint may hold the weights beside other things."""

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.")
"""What wrappers put before every name."""


def load_weights(net: Net, path: str | os.PathLike[str]) -> Net:
    """Fills a network with trained weights from a file, all of them or none.

    Reads what ``torch.save`` wrote, nothing but tensors and plain containers (nothing is unpickled
    that could run code), and ``.safetensors``. The weights may lie under ``state_dict`` and the like, and
    names may begin with ``module.`` or what else a wrapper adds.

    Args:
        net: The network; it is filled in place.
        path: The file.

    Returns:
        The network.

    Raises:
        ValueError: the file is none, or the weights do not fit; names what is missing, what is left over
            and what has another shape.
        TypeError: not a plain network.
        OSError: the file cannot be read.

    Examples:
        >>> load_weights(nn.Linear(2, 2), "absent.pt")
        Traceback (most recent call last):
        ...
        FileNotFoundError: [Errno 2] No such file or directory: 'absent.pt'
    """
    if isinstance(net, Defense) or not isinstance(net, nn.Module):
        raise TypeError(
            f"expected a plain network, got {type(net).__name__}; load a defense with probdefense.load(path)"
        )
    own, weights = net.state_dict(), _without_prefix(_read(Path(path)), net)
    weights = {name: value.to(own[name].dtype) if name in own else value for name, value in weights.items()}
    check_fit(weights, net, Path(path))
    net.load_state_dict(weights)
    return net


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Raises:
        ValueError: it holds something else.
    """
    with path.open("rb"):
        pass  # an absent or forbidden file says so itself
    wanted = f"expected the weights of a network in {path}"
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{wanted}, got objects that would run code when they are read, or no weights at all; save "
            "net.state_dict() alone"
        ) from error
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(
            f"{wanted}, got something else or a part of a file; fetch or save it anew"
        ) from error
    held = _held(content)
    weights = {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
    if not weights:
        raise ValueError(
            f"{wanted}, got {type(content).__name__} without tensors by name; save net.state_dict()"
        )
    return weights


def _held(content: Any) -> Mapping[Any, Any]:
    """What lies under the names of `HOLDERS`, however deep; nothing if it is no mapping."""
    if not isinstance(content, Mapping):
        return {}
    inner = next((content[name] for name in HOLDERS if isinstance(content.get(name), Mapping)), None)
    return content if inner is None else _held(inner)


def _without_prefix(weights: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Names without what wrappers put before all of them, unless the network has it too."""
    own = net.state_dict()
    for _ in PREFIXES:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in weights)), None)
        if prefix is None or any(name.startswith(prefix) for name in own):
            break
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights
