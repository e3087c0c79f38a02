"""What changes the function of a defense and is neither parameter nor buffer, as one entry of its state.

A threshold, a rate, a ceiling, a floor or the family of a noise is not among the tensors of a state, so a
state could be loaded into a build that means another function. Layers name such attributes in
``function_settings``; all of them travel as text in one tensor, which every tool for tensors can carry.
"""

import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution


def settings_of(module: nn.Module) -> dict[str, Any]:
    """The settings of every layer below a module, by path and name."""
    return {
        f"{path}.{name}".lstrip("."): _plain(getattr(layer, name))
        for path, layer in module.named_modules()
        for name in getattr(layer, "function_settings", ())
    }


def packed(settings: dict[str, Any]) -> Tensor:
    """Settings as a tensor of bytes."""
    return torch.tensor(list(json.dumps(settings, sort_keys=True).encode()), dtype=torch.uint8)


def unpacked(state: Any) -> dict[str, Any]:
    """Settings from a tensor of bytes.

    Raises:
        ValueError: the tensor holds something else.
    """
    try:
        settings = json.loads(bytes(state.tolist()))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError("expected the settings of a defense in its state, got something else") from error
    return dict(settings)


def check_settings(given: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuses a state that was made with other settings.

    Raises:
        ValueError: they differ; names them.
    """
    differ = [name for name in sorted({*given, *own}) if given.get(name) != own.get(name)]
    if differ:
        said = "; ".join(f"{name} is {given.get(name)} there, {own.get(name)} here" for name in differ[:5])
        raise ValueError(
            f"expected a state of a defense with the same settings, got others: {said}; build it as the one "
            "that was saved"
        )


def _plain(value: Any) -> Any:
    """A setting as JSON can hold it; a distribution by its family and numbers."""
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, Distribution):
        numbers = {name: getattr(value, name) for name in value.arg_constraints if name in vars(value)}
        return f"{type(value).__name__}({', '.join(f'{k}={_plain(v)}' for k, v in sorted(numbers.items()))})"
    if isinstance(value, Tensor):
        return value.tolist()
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
