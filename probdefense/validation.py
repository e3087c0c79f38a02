"""The public border: every message says what was expected, what came and what to do."""

import inspect
import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn


def check_inputs(x: Any, name: str = "x") -> None:
    """Refuses anything but a non-empty float batch with values in [0, 1].

    Raises:
        TypeError: not a tensor, or integer images.
        ValueError: no batch axis, empty, not finite, or outside [0, 1].
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"expected {name} as a torch.Tensor (batch, *event), got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(
            f"expected float {name} in [0, 1], got {x.dtype}; divide integer images by 255 first; tokens are "
            "out of scope: give the network embeddings, scaled to [0, 1], or attack text with TextAttack"
        )
    if x.dim() < 2:
        raise ValueError(
            f"expected {name} with a batch axis, (batch, *event), got shape {tuple(x.shape)}; "
            "add the axis with x.unsqueeze(0)"
        )
    if x.numel() == 0:
        raise ValueError(f"expected at least one example in {name}, got shape {tuple(x.shape)}")
    low, high = (float(value) for value in torch.aminmax(x.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"expected finite values in {name}, got NaN or infinity; clean the data first")
    if low < 0 or high > 1:
        raise ValueError(
            f"expected {name} in [0, 1], got values in [{low:.4g}, {high:.4g}]; "
            "rescale the data and normalize inside the network with probdefense.nn.Normalize"
        )


def check_labels(y: Any, batch: int, name: str = "y") -> None:
    """Refuses anything but int64 labels, one per example.

    Raises:
        TypeError: not an int64 tensor.
        ValueError: wrong shape or a negative label.
    """
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"expected {name} as int64 class indices, got {kind}; {_to_labels(y, name)}")
    if y.shape != (batch,):
        raise ValueError(f"expected {name} of shape ({batch},), one label per example, got {tuple(y.shape)}")
    if int(y.min()) < 0:
        raise ValueError(f"expected {name} >= 0, got {int(y.min())}; labels are class indices from 0")


def _to_labels(y: Any, name: str) -> str:
    """What to do with labels of another kind."""
    if not isinstance(y, Tensor):
        return f"convert with torch.as_tensor({name})"
    if y.dim() == 2:
        return f"take the class of one-hot or soft labels with {name}.argmax(1)"
    if y.is_floating_point() or y.is_complex():
        return (
            "regression is out of scope: train it with Pyro's own SVI, or cut the target into classes with "
            f"torch.bucketize({name}, boundaries)"
        )
    return f"convert with {name}.long()"


def check_classes(y: Tensor, num_classes: int, name: str = "y") -> None:
    """Refuses labels that the logits have no column for.

    Raises:
        ValueError: a label is not below the number of classes.
    """
    if int(y.max()) >= num_classes:
        raise ValueError(
            f"expected {name} < {num_classes}, the number of classes in the logits, got {int(y.max())}; "
            "check the labels or the width of the last layer"
        )


def check_output(output: Any, batch: int) -> None:
    """Refuses anything but the logits of a network for its batch.

    Raises:
        TypeError: not a tensor, or not of floats.
        ValueError: not ``(batch, classes)``, or fewer than two classes.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        came = str(output.dtype) if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            f"expected the network to return logits (batch, classes) as one float tensor, got {came}; wrap "
            "it in a module whose forward returns them, such as net(x)[0], net(x)['logits'] or net(x).logits"
        )
    if output.dim() != 2 or output.shape[0] != batch:
        raise ValueError(
            f"expected the network to return logits ({batch}, classes), got {tuple(output.shape)}; flatten "
            "or average the other axes inside the network"
        )
    check_num_classes(output.shape[1])


def check_num_classes(count: int) -> None:
    """Refuses a single logit, on which a softmax is always sure.

    Raises:
        ValueError: fewer than two classes.
    """
    if count < 2:
        raise ValueError(
            f"expected logits of at least two classes, got {count}; a network with one logit becomes one "
            "with two by probdefense.nn.TwoLogits(net)"
        )


def check_logits(logits: Any, batch: int) -> None:
    """Refuses anything but logits with a sample axis.

    Raises:
        TypeError: not a tensor.
        ValueError: not ``(samples, batch, classes)``, or fewer than two classes.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"expected logits (samples, batch, classes) as one tensor, got {type(logits).__name__}; return "
            "the logits alone, with a sample axis in front"
        )
    if logits.dim() != 3 or logits.shape[1] != batch or logits.shape[0] < 1:
        raise ValueError(
            f"expected logits (samples, {batch}, classes), got {tuple(logits.shape)}; "
            "wrap a plain network with probdefense.deterministic(net)"
        )
    check_num_classes(logits.shape[2])


def check_answer(logits: Any, batch: int, where: str) -> Tensor:
    """The logits of an answer that decides something, in single precision or better.

    Raises:
        TypeError: not a tensor.
        ValueError: not ``(samples, batch, classes)``, or fewer than two classes.
        FloatingPointError: NaN or infinity, see `check_finite_logits`.
    """
    check_logits(logits, batch)
    check_finite_logits(logits, where)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuses anything but an integer of at least `least`.

    Raises:
        TypeError: not an integer.
        ValueError: too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected {name} as an integer, got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"expected {name} >= {least}, got {value}")


def check_positive(name: str, value: Any, *, zero: bool = False) -> None:
    """Refuses anything but a finite positive number (or, with `zero`, a non-negative one).

    Raises:
        TypeError: not a number.
        ValueError: not finite or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"expected {name} as a number, got {type(value).__name__} {value!r}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"expected {name} {'>=' if zero else '>'} 0 and finite, got {value}")


def check_share(name: str, value: Any) -> None:
    """Refuses anything but a number strictly between 0 and 1.

    Raises:
        TypeError: not a number.
        ValueError: outside (0, 1).
    """
    check_positive(name, value)
    if value >= 1:
        raise ValueError(f"expected 0 < {name} < 1, got {value}")


def check_eps(eps: Any, batch: int | None = None) -> None:
    """Refuses a radius that is negative, not finite, or not one number or one per example.

    Raises:
        TypeError: not a number or tensor.
        ValueError: negative, not finite, or the wrong shape.
    """
    if isinstance(eps, Tensor):
        if eps.dim() > 1 or (eps.dim() == 1 and batch is not None and len(eps) != batch):
            raise ValueError(
                f"expected eps as one number or one per example ({batch},), got shape {tuple(eps.shape)}"
            )
        if not bool(torch.isfinite(eps).all()) or bool((eps < 0).any()):
            raise ValueError("expected eps >= 0 and finite, in pixels, got a negative or non-finite value")
        return
    check_positive("eps", eps, zero=True)


def check_norm(norm: Any) -> None:
    """Refuses a norm other than 1, 2 and infinity.

    Raises:
        ValueError: another norm.
    """
    if norm not in (1, 2, math.inf):
        raise ValueError(f"expected norm 1, 2 or math.inf, got {norm!r}")


def check_function(name: str, value: Any, *arguments: str, **options: Any) -> None:
    """Refuses what cannot be called with these arguments and options.

    Raises:
        TypeError: not a function, or one of other arguments.
    """
    wanted = f"expected {name} as a function of ({', '.join((*arguments, *options))})"
    if not callable(value):
        raise TypeError(f"{wanted}, got {type(value).__name__} {value!r:.60}")
    with suppress(ValueError):  # of some builtin functions nobody knows the arguments
        signature = inspect.signature(value.forward if isinstance(value, nn.Module) else value)
        try:
            signature.bind(*arguments, **options)
        except TypeError as error:
            raise TypeError(f"{wanted}, got one of {signature}: {error}; wrap it in a lambda") from error


def check_member(name: str, value: str, known: Any) -> None:
    """Refuses a name that is not among the known ones, and lists them.

    Raises:
        ValueError: unknown name.
    """
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(sorted(known))}")


def check_finite_logits(logits: Tensor, where: str, examples: Tensor | None = None) -> None:
    """Refuses NaN and +inf; -inf rules a class out and is welcome unless it rules out all of them.

    Args:
        logits: ``(..., batch, classes)``.
        where: For the message: who asked.
        examples: Numbers of the examples, where the rows are they, several times over.

    Raises:
        FloatingPointError: naming how many examples and which.
    """
    top = logits.detach().amax(-1)  # NaN wins, +inf wins, and -inf is left only where nothing else is
    if bool(torch.isfinite(top).all()):
        return
    batch = top.shape[-1]
    bad = (~torch.isfinite(top)).reshape(-1, batch).any(0).nonzero().flatten().cpu()
    if examples is not None and batch % len(examples) == 0:
        batch, bad = len(examples), examples.cpu()[bad % len(examples)].unique()
    raise FloatingPointError(
        f"NaN or infinite logits in {where} for {len(bad)} of {batch} examples, {bad[:10].tolist()}; "
        "expected finite logits, or -inf for classes that are ruled out, though not for all; check the "
        "network for log, sqrt or division at 0 and for overflow"
    )
