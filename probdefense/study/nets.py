"""Networks by name, and what of the data they need to know."""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from probdefense import models
from probdefense.data.scripts import named, run_file
from probdefense.data.sources import import_torchvision
from probdefense.rng import forked
from probdefense.validation import check_member, check_output

BY_NAME = [name for name in models.__all__ if name != "load_weights"]


class Facts(NamedTuple):
    """What a network must fit: the shape of an image, and the number of classes."""

    shape: tuple[int, ...]
    classes: int


def facts_of(train: Any) -> Facts:
    """The facts of a training set, which need not be in memory.

    Raises:
        ValueError: no images.
    """
    if not len(train):
        raise ValueError("expected training images, got none; give other data")
    shape = tuple(torch.as_tensor(train[0][0]).shape)
    if hasattr(train, "tensors"):
        return Facts(shape, int(train.tensors[1].max()) + 1)
    if hasattr(train, "classes"):
        return Facts(shape, len(train.classes))
    return Facts(shape, 1 + max(int(train[index][1]) for index in range(len(train))))


def net_of(name: str, facts: Facts) -> nn.Module:
    """A fresh network by the name that the command knows.

    Args:
        name: A network of `probdefense.models`, ``torchvision:NAME`` or ``FILE.py:NAME``, a network or a
            function that makes one, whose argument ``num_classes``, if it has one, is filled.
        facts: What it must fit.

    Raises:
        ValueError: an unknown name, or what is there makes no network.
        ImportError: torchvision does not import.
    """
    made = _maker(name, facts)()
    if not isinstance(made, nn.Module):
        raise ValueError(f"expected {name} as a network, got {type(made).__name__}; return a torch.nn.Module")
    return made


def check_net(name: str, facts: Facts) -> None:
    """Refuses a network that does not answer images like these with logits for as many classes.

    Raises:
        ValueError: it does not.
        ImportError: torchvision does not import.
    """
    with forked(0), torch.no_grad():
        try:
            net = net_of(name, facts).eval()
        except (ValueError, ImportError):
            raise
        except Exception as error:  # whatever the user's function says
            raise ValueError(f"{name} raised {type(error).__name__}: {error}; call it in Python") from error
        try:
            output = net(torch.zeros(2, *facts.shape))
        except Exception as error:  # whatever the user's network says
            told = " ".join(str(error).split())
            raise ValueError(
                f"{name} does not take images of shape {facts.shape} ({told}); name another network"
            ) from error
    check_output(output, 2)
    if output.shape[1] < facts.classes:
        raise ValueError(
            f"expected {name} with at least {facts.classes} classes, got {output.shape[1]}; name "
            "another network"
        )


def _maker(name: str, facts: Facts) -> Callable[[], Any]:
    if name.startswith("torchvision:"):
        known = import_torchvision().models
        check_member("network", name, [f"torchvision:{each}" for each in known.list_models(module=known)])
        return partial(known.get_model, name.partition(":")[2], weights=None, num_classes=facts.classes)
    if ".py:" in name:
        return _own(name, facts)
    check_member("network", name, [*BY_NAME, "torchvision:NAME", "FILE.py:NAME"])
    return _filled(getattr(models, name), facts)


def _own(where: str, facts: Facts) -> Callable[[], Any]:
    """What a name in a file of the user's makes; a network that is there already is copied."""
    file, _, name = where.rpartition(":")
    found = getattr(run_file(Path(file)), name, None)
    if isinstance(found, nn.Module):
        return partial(copy.deepcopy, found)
    return _filled(found, facts) if callable(found) else partial(named, where)


def _filled(make: Callable[..., Any], facts: Facts) -> Callable[[], Any]:
    """A function with those of its arguments filled that depend on the data."""
    known = {"in_channels": facts.shape[0], "num_classes": facts.classes}
    taken = inspect.signature(make).parameters
    return partial(make, **{key: value for key, value in known.items() if key in taken})
