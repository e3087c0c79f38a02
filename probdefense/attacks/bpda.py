r"""BPDA: the true forward pass, a surrogate's backward pass.

Athalye, Carlini and Wagner, 2018, [Obfuscated Gradients Give a False Sense of
Security](https://arxiv.org/abs/1802.00420). A module that rounds, thresholds or otherwise shatters
gradients keeps its output and gets the derivative of a smooth stand-in:

$$ \text{forward } g(x), \qquad \text{backward } \nabla s(x), \quad s \approx g $$
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from probdefense.validation import check_function, check_kind

Surrogate = Callable[[Tensor], Tensor]
"""A smooth function of the first input of a module, with the shape of its output."""


@contextmanager
def bpda(net: nn.Module, surrogates: Mapping[Any, Surrogate]) -> Iterator[None]:
    """Inside the block the given modules backpropagate through their surrogates.

    Attacks need no change, and answers stay what they were to the last bit. A frozen function or the
    mean network of a `Defense` is affected too; names are those of the module given, so pass
    ``defense.net`` to use the names of the network.

    Args:
        net: A network or a `Defense`.
        surrogates: A function of the module's first input, by name of a module (`str`) or by type.

    Raises:
        ValueError: a name or type that no module has, or, in the block, a surrogate of another shape.

    References:
        Athalye, Carlini and Wagner, 2018, [Obfuscated Gradients Give a False Sense of Security:
        Circumventing Defenses to Adversarial Examples](https://arxiv.org/abs/1802.00420)

    Examples:
        >>> import probdefense as pd
        >>> class Round(torch.nn.Module):
        ...     def forward(self, x):
        ...         return (8 * x).round() / 8
        >>> net = pd.deterministic(torch.nn.Sequential(Round(), torch.nn.Linear(4, 3)))
        >>> with bpda(net, {Round: lambda x: x}):
        ...     x_adv = pd.attacks.pgd(net, torch.rand(2, 4), torch.tensor([0, 1]), eps=0.1)
    """
    check_kind("net", net, nn.Module, "give the network or the defense that the surrogates are for")
    check_kind("surrogates", surrogates, Mapping, "give a dictionary of functions by module name or class")
    for key, surrogate in surrogates.items():
        check_function(f"the surrogate of {key}", surrogate, "x")
    with ExitStack() as stack:
        for key, surrogate in surrogates.items():
            for name, module in _found(net, key):
                handle = module.register_forward_hook(partial(_straight_through, name, surrogate))
                stack.callback(handle.remove)
        yield


def _found(net: nn.Module, key: str | type[nn.Module]) -> list[tuple[str, nn.Module]]:
    """The module of that name, or all of that type, each once."""
    modules = list(net.named_modules())
    found = [(n, m) for n, m in modules if (n == key if isinstance(key, str) else isinstance(m, key))]
    if not found:
        known = ", ".join(f"{n} ({type(m).__name__})" for n, m in modules if n)
        raise ValueError(
            f"expected a name or a class, found no module {key!r} to give a surrogate; known: {known}"
        )
    return found


def _straight_through(
    name: str, surrogate: Surrogate, module: nn.Module, args: tuple[Any, ...], output: Tensor
) -> Tensor | None:
    if not torch.is_grad_enabled():
        return None
    smooth = surrogate(args[0])
    if smooth.shape != output.shape:
        raise ValueError(
            f"expected the surrogate of {name} to give {tuple(output.shape)}, got {tuple(smooth.shape)}; it "
            "stands in for the module element by element"
        )
    return output.detach() + (smooth - smooth.detach())
