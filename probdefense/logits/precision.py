"""Forward passes in a smaller type: what decides and what is climbed stays in single precision or better."""

import inspect
from typing import Any

import torch
from torch import Tensor

from probdefense.logits.adapters import Counted
from probdefense.types import Inputs, Logits, LogitsFn

ANSWERS = ("drawn", "respond")
"""Methods that answer with logits themselves; others give functions that do."""


def check_amp(amp: Any) -> None:
    """Refuses a type in which gradients of random functions vanish.

    Raises:
        ValueError: another type than bfloat16.
    """
    if amp not in (None, torch.bfloat16):
        raise ValueError(
            f"expected amp=torch.bfloat16 or None, got {amp}; float16 would need its losses scaled, and "
            "gradients over draws do not bear it"
        )


def cast(logits_fn: LogitsFn, amp: torch.dtype | None) -> LogitsFn:
    """The function with its forward passes under autocast; itself without a type."""
    check_amp(amp)
    return logits_fn if amp is None else Cast(logits_fn, amp)


class Cast:
    """A LogitsFn whose passes compute in a smaller type where torch deems that safe; logits come in float32.

    Args:
        logits_fn: What is asked.
        dtype: Of the passes.
    """

    def __init__(self, logits_fn: LogitsFn, dtype: torch.dtype):
        self.logits_fn, self.dtype = logits_fn, dtype

    @property
    def stochastic(self) -> bool:
        """As the function itself."""
        return self.logits_fn.stochastic

    def __call__(self, x: Inputs, num_samples: int | None = None, **options: Any) -> Logits:
        """``(samples, batch, classes)``, float32 or better."""
        return self._within(self.logits_fn, x, num_samples, **options)

    def _within(self, function: Any, x: Inputs, *rest: Any, **options: Any) -> Tensor:
        with torch.autocast(x.device.type, self.dtype):
            logits = function(x, *rest, **options)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("logits_fn", "dtype"):
            raise AttributeError(name)
        value = getattr(self.logits_fn, name)
        if name in ANSWERS:
            return lambda x, *rest, **options: self._within(value, x, *rest, **options)
        if name not in Counted.DERIVED:
            return value
        if not inspect.isroutine(value):
            return Cast(value, self.dtype)
        return lambda *args, **kwargs: Cast(value(*args, **kwargs), self.dtype)
