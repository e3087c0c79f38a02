"""Examples, labels and logits: what may come in, and what a network may answer."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from probdefense.validation.settings import kind_of
from probdefense.validation.watching import deferred, require

ROUNDING = 1e-6
"""How far outside [0, 1] pixels may lie by rounding, in float32 or better."""


def check_inputs(x: Any, name: str = "x") -> Tensor:
    """Refuses anything but a non-empty float batch with values in [0, 1].

    Returns:
        The batch; values that rounding carried out of the box are put back onto its edge.

    Raises:
        TypeError: not a tensor, or integer images.
        ValueError: no batch axis, empty, not finite, or outside [0, 1].
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"expected {name} as a torch.Tensor (batch, *event), got {kind_of(x)}; convert with "
            f"torch.as_tensor({name}, dtype=torch.float32)"
        )
    if not x.is_floating_point():
        raise TypeError(
            f"expected float {name} in [0, 1], got {x.dtype}; divide integer images by 255 first; tokens are "
            "out of scope: give the network embeddings, scaled to [0, 1], or attack text with TextAttack"
        )
    _check_stored(x, name)
    if x.dim() < 2:
        raise ValueError(
            f"expected {name} with a batch axis, (batch, *event), got shape {tuple(x.shape)}; "
            "add the axis with x.unsqueeze(0)"
        )
    if x.numel() == 0:
        raise ValueError(
            f"expected at least one example in {name}, got shape {tuple(x.shape)}; leave empty batches out"
        )
    return _in_box(x, name)


def _in_box(x: Tensor, name: str) -> Tensor:
    ends = torch.aminmax(x.detach())
    if deferred(x):
        require(_within(*ends, x.dtype), lambda: _not_in_box(float(ends[0]), float(ends[1]), name))
        return x.clamp(0, 1)
    low, high = (float(value) for value in ends)
    if not _within(low, high, x.dtype):
        raise _not_in_box(low, high, name)
    return x if low >= 0 and high <= 1 else x.clamp(0, 1)


def _within(low: Any, high: Any, dtype: torch.dtype) -> Any:
    """Whether values, numbers or tensors, are no further outside than rounding carries them; NaN is not."""
    rounding = max(ROUNDING, torch.finfo(dtype).eps)
    return (low >= -rounding) & (high <= 1 + rounding)


def _not_in_box(low: float, high: float, name: str) -> ValueError:
    if not (math.isfinite(low) and math.isfinite(high)):
        return ValueError(f"expected finite values in {name}, got NaN or infinity; clean the data first")
    return ValueError(
        f"expected {name} in [0, 1], got values in [{low:.4g}, {high:.4g}]; "
        "rescale the data and normalize inside the network with probdefense.nn.Normalize"
    )


def _check_stored(x: Tensor, name: str) -> None:
    if x.device.type == "meta" or x.layout != torch.strided:
        came = "one on the meta device" if x.device.type == "meta" else f"one of layout {x.layout}"
        raise ValueError(
            f"expected {name} as a dense tensor with values, got {came}; move it with .to('cpu') or "
            ".to_dense()"
        )


def check_like(value: Any, x: Tensor, name: str) -> Tensor:
    """Refuses anything but inputs of the event shape of `x`, of any number; returns them.

    Raises:
        TypeError: not a tensor.
        ValueError: bad inputs, or others than `x` in shape.
    """
    value = check_inputs(value, name)
    if value.shape[1:] != x.shape[1:]:
        event = ", ".join(map(str, x.shape[1:]))
        raise ValueError(
            f"expected {name} of shape (batch, {event}), as x, got {tuple(value.shape)}; give inputs of one "
            "size"
        )
    return value


def check_same(value: Any, x: Tensor, name: str) -> Tensor:
    """Refuses anything but inputs of the shape of `x`, one for each of its rows; returns them.

    Raises:
        TypeError: not a tensor.
        ValueError: bad inputs, or others than `x` in shape or number.
    """
    value = check_like(value, x, name)
    if len(value) != len(x):
        raise ValueError(
            f"expected {name} of shape {tuple(x.shape)}, one row for each of x, got {tuple(value.shape)}; "
            "give both of the same examples"
        )
    return value


def check_labels(y: Any, batch: int, name: str = "y") -> None:
    """Refuses anything but int64 labels, one per example.

    Raises:
        TypeError: not an int64 tensor.
        ValueError: wrong shape or a negative label.
    """
    check_label_form(y, batch, name)
    if batch:
        low = y.min()
        message = f"expected {name} >= 0, got {{}}; labels are class indices from 0"
        require(low >= 0, lambda: ValueError(message.format(int(low))))


def check_label_form(y: Any, batch: int, name: str = "y") -> None:
    """Refuses anything but an int64 tensor of one number per example, without a look at the numbers.

    Raises:
        TypeError: not an int64 tensor.
        ValueError: wrong shape.
    """
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"expected {name} as int64 class indices, got {kind}; {_to_labels(y, name)}")
    if y.shape != (batch,):
        raise ValueError(
            f"expected {name} of shape ({batch},), one label per example, got {tuple(y.shape)}; inputs and "
            "labels belong together row by row"
        )
    _check_stored(y, name)


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


def check_examples(data: Any, name: str = "data") -> tuple[Tensor, Tensor]:
    """Refuses anything but a pair of inputs and labels; returns it, see `check_inputs`.

    Raises:
        TypeError: not a pair of tensors.
        ValueError: bad inputs or labels.
    """
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise TypeError(
            f"expected {name} as a pair (x, y) of tensors, got {kind_of(data)}; join the batches of a loader "
            "with torch.cat"
        )
    x = check_inputs(data[0])
    check_labels(data[1], len(x))
    return x, data[1]


def check_classes(y: Tensor, num_classes: int, name: str = "y") -> None:
    """Refuses labels that the logits have no column for.

    Raises:
        ValueError: a label is not below the number of classes.
    """
    high = y.max()
    require(
        high < num_classes,
        lambda: ValueError(
            f"expected {name} < {num_classes}, the number of classes in the logits, got {int(high)}; "
            "check the labels or the width of the last layer"
        ),
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


def like_probabilities(logits: Tensor) -> Tensor:
    """Whether answers look like probabilities, one bool on their device."""
    inside = (logits >= 0) & (logits <= 1)
    return inside.all() & ((logits.float().sum(-1) - 1).abs() < 1e-4).all()


def warn_of_probabilities(consequence: str, stacklevel: int) -> None:
    """Says what a softmax of probabilities does."""
    warnings.warn(
        "the answers look like probabilities; expected logits or log-probabilities, because a second softmax "
        f"flattens the loss and {consequence}: return the logits",
        stacklevel=stacklevel + 1,
    )


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


def check_logits(logits: Any, batch: int | None = None) -> None:
    """Refuses anything but logits with a sample axis, of `batch` examples if that is known.

    Raises:
        TypeError: not a tensor of floats.
        ValueError: not ``(samples, batch, classes)``, or fewer than two classes.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        came = str(logits.dtype) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(
            f"expected logits (samples, batch, classes) as one float tensor, got {came}; return "
            "the logits alone, with a sample axis in front"
        )
    if logits.dim() != 3 or len(logits) < 1 or batch not in (None, logits.shape[1]):
        raise ValueError(
            f"expected logits (samples, {'batch' if batch is None else batch}, classes), got "
            f"{tuple(logits.shape)}; wrap a plain network with probdefense.deterministic(net), or give its "
            "logits a sample axis with logits[None]"
        )
    check_num_classes(logits.shape[2])


def check_log_probs(log_probs: Any, y: Any) -> None:
    """Refuses anything but log-probabilities ``(batch, classes)`` and labels of these classes.

    Raises:
        TypeError: not a float tensor, or bad labels.
        ValueError: another shape, no examples, NaN, probabilities that do not sum to 1, or bad labels.
    """
    way = "give Prediction.log_probs, or logits.log_softmax(-1)"
    if not isinstance(log_probs, Tensor) or not log_probs.is_floating_point():
        raise TypeError(
            f"expected log_probs (batch, classes) as a float tensor, got {kind_of(log_probs)}; {way}, "
            "or convert with torch.as_tensor"
        )
    if log_probs.dim() != 2 or 0 in log_probs.shape:
        raise ValueError(
            f"expected log_probs (batch, classes) of at least one example, got {tuple(log_probs.shape)}; "
            f"{way}"
        )
    check_labels(y, len(log_probs))
    check_classes(y, log_probs.shape[-1])
    total = log_probs.detach().double().exp().sum(-1)
    slack = max(1e-3, 4 * torch.finfo(log_probs.dtype).eps)
    if not bool(((total - 1).abs() <= slack).all()):  # NaN is not
        worst = float(total[(total - 1).abs().nan_to_num(torch.inf).argmax()])
        raise ValueError(
            f"expected log_probs of probabilities that sum to 1, got a sum of {worst:.4g} (NaN if one is "
            f"NaN); {way}"
        )


def check_vector(values: Any, name: str, size: int | None = None) -> Tensor:
    """Refuses anything but a tensor of one number per input, without NaN; returns it.

    Raises:
        TypeError: not a tensor.
        ValueError: another shape, empty, or NaN.
    """
    if not isinstance(values, Tensor):
        raise TypeError(
            f"expected {name} as a tensor (n,), got {kind_of(values)}; convert with torch.as_tensor"
        )
    if values.is_complex():
        raise TypeError(f"expected {name} as real numbers, got {values.dtype}; take .real or .abs()")
    wanted = "(n,)" if size is None else f"({size},)"
    if values.dim() != 1 or not len(values) or size not in (None, len(values)):
        raise ValueError(
            f"expected {name} as {wanted}, one number per input, got {tuple(values.shape)}; flatten it, and "
            "leave empty sets out"
        )
    if bool(values.isnan().any()):
        raise ValueError(f"expected numbers in {name}, got NaN; look for where they come from")
    return values


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


def check_values(values: Any, shape: tuple[int, ...], what: str) -> Tensor:
    """Refuses anything but a tensor of that shape from a user's function of logits; returns it.

    Raises:
        TypeError: not a tensor.
        ValueError: another shape.
    """
    axes = {1: "(batch,)", 2: "(batch, classes)"}.get(len(shape), "")
    if not isinstance(values, Tensor):
        raise TypeError(
            f"expected the {what} to give a tensor {axes}, got {kind_of(values)}; return torch's numbers"
        )
    if values.shape != shape:
        raise ValueError(
            f"expected the {what} to give {axes}, here {tuple(shape)}, got {tuple(values.shape)}; logits "
            "come as (samples, batch, classes): reduce the axis of draws, and keep the others"
        )
    return values


def check_finite_logits(logits: Tensor, where: str, examples: Tensor | None = None) -> None:
    """Refuses NaN and +inf; -inf rules a class out and is welcome unless it rules out all of them.

    Args:
        logits: ``(..., batch, classes)``.
        where: For the message: who asked.
        examples: Numbers of the examples, where the rows are they, several times over.

    Raises:
        FloatingPointError: naming how many examples and which.
    """
    values = logits.detach()
    if deferred(values) or not math.isfinite(values.sum()):  # one sum sees all that is not finite
        top = values.amax(-1)  # NaN wins, +inf wins, and -inf is left only where nothing else is
        require(torch.isfinite(top).all(), lambda: _not_finite(top, where, examples))


def _not_finite(top: Tensor, where: str, examples: Tensor | None) -> FloatingPointError:
    batch = top.shape[-1]
    bad = (~torch.isfinite(top)).reshape(-1, batch).any(0).nonzero().flatten().cpu()
    if examples is not None and batch % len(examples) == 0:
        batch, bad = len(examples), examples.cpu()[bad % len(examples)].unique()
    return FloatingPointError(
        f"NaN or infinite logits in {where} for {len(bad)} of {batch} examples, {bad[:10].tolist()}; "
        "expected finite logits, or -inf for classes that are ruled out, though not for all; check the "
        "network for log, sqrt or division at 0 and for overflow"
    )
