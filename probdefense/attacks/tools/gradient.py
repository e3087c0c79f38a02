"""The gradient of an attacker's loss with respect to the input: the only caller of autograd."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from probdefense.logits.adapters import independent
from probdefense.types import Inputs, Labels, Logits, LogitsFn, LossFn
from probdefense.validation import check_values, watching


def ask(logits_fn: LogitsFn, x: Inputs, num_samples: int | None = None) -> Logits:
    """An answer that nobody will differentiate, of independent draws: something is decided on it."""
    with torch.no_grad():
        return logits_fn(x, num_samples, **independent(logits_fn))


class Gradient(NamedTuple):
    """What one gradient evaluation gives: all detached, and what was climbed per example."""

    gradient: Tensor
    value: Tensor
    logits: Logits


def climb(loss: LossFn, y: Labels, target: Labels | None = None) -> Callable[[Logits], Tensor]:
    """What the attacker climbs per example: the loss at `y`, or minus the loss at the target.

    A loss with a form of its own for targets carries it as the attribute ``toward``.
    """

    def climbed(logits: Logits) -> Tensor:
        toward = getattr(loss, "toward", None)
        if target is None:
            values = loss(logits, y)
        elif toward is not None:
            values = toward(logits, y, target)
        else:
            values = loss(logits, target)
        values = check_values(values, y.shape, "loss")
        return values if target is None or toward is not None else -values

    return climbed


def input_gradient(
    logits_fn: LogitsFn,
    x: Inputs,
    climbed: Callable[[Logits], Tensor],
    *,
    repeats: int = 1,
    signs: bool = False,
    where: str = "the attack",
) -> Gradient:
    """Gradient of a per-example loss in `x`; nothing else receives a gradient.

    Args:
        logits_fn: What answers with logits.
        x: ``(batch, *event)``.
        climbed: ``logits -> (batch,)``, see `climb`.
        repeats: Batches of draws whose gradients are averaged, when memory is short.
        signs: Whether the signs of these gradients are averaged instead.
        where: For the error message: the attack and its step.

    Raises:
        ValueError: the answer does not depend differentiably on `x`.
        FloatingPointError: NaN or infinite gradients, naming the attack, the step and the examples.
    """
    slopes = [_slope(logits_fn, x, climbed, where) for _ in range(repeats)]
    if signs:
        slopes = [slope._replace(gradient=slope.gradient.sign()) for slope in slopes]
    if repeats == 1:
        return slopes[0]
    gradients, values, logits = zip(*slopes, strict=True)
    return Gradient(torch.stack(gradients).mean(0), torch.stack(values).mean(0), torch.cat(logits))


def input_jacobian(
    logits_fn: LogitsFn, x: Inputs, scores: Callable[[Logits], Tensor], *, where: str = "the attack"
) -> Gradient:
    """Gradients of several scores per example from one forward pass.

    Args:
        logits_fn: What answers with logits.
        x: ``(batch, *event)``.
        scores: ``logits -> (batch, scores)``.
        where: For the error message.

    Returns:
        Gradients ``(scores, batch, *event)`` and scores ``(scores, batch)``.

    Raises:
        ValueError: the answer does not depend differentiably on `x`.
        FloatingPointError: NaN or infinite gradients.
    """
    point, values, logits = _forward(logits_fn, x, scores, where)
    with torch.enable_grad():
        columns = values.unbind(1)
    last = len(columns) - 1
    gradients = [_backward(column, point, where, keep=k < last) for k, column in enumerate(columns)]
    return Gradient(torch.stack(gradients), values.detach().to(x.dtype).T, logits)


def _slope(logits_fn: LogitsFn, x: Inputs, climbed: Callable[[Logits], Tensor], where: str) -> Gradient:
    point, values, logits = _forward(logits_fn, x, climbed, where)
    return Gradient(_backward(values, point, where), values.detach().to(x.dtype), logits)


def _forward(
    logits_fn: LogitsFn, x: Inputs, function: Callable[[Logits], Tensor], where: str
) -> tuple[Inputs, Tensor, Logits]:
    """The point of differentiation, the function of the logits there, and the logits."""
    with torch.enable_grad():
        point = x.detach().requires_grad_(True)
        logits = logits_fn(point)
        values = function(logits)
    if not values.requires_grad:
        raise _detached(where)
    return point, values, logits.detach()


def _backward(values: Tensor, point: Inputs, where: str, *, keep: bool = False) -> Tensor:
    with torch.enable_grad():
        total = values.sum()  # of a scalar: for given slopes of the values torch would load a compiler
    (gradient,) = torch.autograd.grad(total, point, retain_graph=keep, allow_unused=True)
    if gradient is None:
        raise _detached(where)
    # One sum sees every NaN and infinity; which examples they are in is asked only then.
    if not watching.immediate(gradient) or not math.isfinite(gradient.sum()):
        fine = torch.isfinite(gradient.flatten(1)).all(1)
        watching.require(fine.all(), lambda: _not_finite(fine, where))
    return gradient


def _not_finite(fine: Tensor, where: str) -> FloatingPointError:
    bad = (~fine).nonzero().flatten().tolist()
    return FloatingPointError(
        f"expected finite numbers, got NaN or infinite gradient in {where} for examples {bad[:10]}; "
        "check the network for operations such as sqrt or log at 0"
    )


def _detached(where: str) -> ValueError:
    return ValueError(
        f"expected logits with a gradient, got some that do not depend on x differentiably (in {where}); "
        "remove a detach() or no_grad() from the network or the loss, or use bpda or a gradient-free attack"
    )
