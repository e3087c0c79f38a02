"""How often a loop would wait for a device: counted on the CPU, which plays one."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from probdefense.validation import watching

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2"}
"""Operations whose result the host needs before it goes on."""


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        masks = args[1] if name.startswith("aten::index") and isinstance(args[1], list | tuple) else ()
        self.count += name in WAITS or any(m is not None and m.dtype == torch.bool for m in masks)
        return func(*args, **(kwargs or {}))


def counted_syncs(run: Callable[[], object]) -> int:
    """Waits of a run in which no tensor counts as one of the CPU."""
    counting = _Counting()
    kept = watching.fetched

    def fetched(values: torch.Tensor) -> list[float]:
        counting.count += 1
        return kept(values)

    pretended = mock.patch.object(watching, "immediate", lambda _: False)
    with pretended, mock.patch.object(watching, "fetched", fetched), counting:
        run()
    return counting.count
