"""The gradient of an attacker's loss with respect to the input: the only caller of autograd."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from probdefense.types import Inputs, Labels, Logits, LogitsFn, LossFn


class Gradient(NamedTuple):
    """What one gradient evaluation gives: all detached, and what was climbed per example."""

    gradient: Tensor
    value: Tensor
    logits: Logits


def climb(loss: LossFn, y: Labels, target: Labels | None = None) -> Callable[[Logits], Tensor]:
    """What the attacker climbs per example: the loss at `y`, or minus the loss at the target."""
    if target is None:
        return lambda logits: loss(logits, y)
    return lambda logits: -loss(logits, target)


def input_gradient(
    logits_fn: LogitsFn,
    x: Inputs,
    climbed: Callable[[Logits], Tensor],
    *,
    repeats: int = 1,
    where: str = "the attack",
) -> Gradient:
    """Gradient of a per-example loss in `x`; nothing else receives a gradient.

    Args:
        logits_fn: What answers with logits.
        x: ``(batch, *event)``.
        climbed: ``logits -> (batch,)``, see `climb`.
        repeats: Batches of draws whose gradients are averaged, when memory is short.
        where: For the error message: the attack and its step.

    Raises:
        ValueError: the answer does not depend differentiably on `x`.
        FloatingPointError: NaN or infinite gradients, naming the attack, the step and the examples.
    """
    total: Tensor | None = None
    value = torch.zeros((), dtype=x.dtype, device=x.device)
    for _ in range(repeats):
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            logits = logits_fn(point)
            losses = climbed(logits)
            if not losses.requires_grad:
                raise ValueError(
                    f"the logits do not depend on x differentiably (in {where}); remove a detach() or "
                    "no_grad() from the network, or use bpda or a gradient-free attack"
                )
            (gradient,) = torch.autograd.grad(losses.sum(), point)
        total = gradient if total is None else total + gradient
        value = value + losses.detach()
    assert total is not None
    finite = torch.isfinite(total.flatten(1)).all(1)
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        raise FloatingPointError(
            f"NaN or infinite gradient in {where} for examples {bad[:10]}; check the network for "
            "operations such as sqrt or log at 0"
        )
    return Gradient(total / repeats, value / repeats, logits.detach())
