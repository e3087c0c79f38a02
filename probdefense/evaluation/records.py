"""What is kept of one run on one chunk, as arrays that can be written down, read again and joined."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from probdefense.evaluation.points import Spent
from probdefense.evaluation.verdicts import Seen

BY_VERDICT = "correct/"
"""Arrays under names that begin so have the verdicts in front of the examples."""


class Record(NamedTuple):
    """Arrays by name, ``(batch, ...)`` or ``(verdicts, batch)``, the draws behind a verdict, and the cost."""

    arrays: dict[str, np.ndarray]
    num_samples: int
    spent: Spent

    @classmethod
    def of(cls, seen: Seen, spent: Spent, distance: Tensor | None = None) -> "Record":
        """What was seen of some points, with how far they are."""
        arrays = {"log_probs": seen.log_probs, "expected_entropy": seen.expected_entropy}
        arrays |= {f"correct/{rule}": correct for rule, correct in seen.correct.items()}
        arrays |= {f"margins/{rule}": margin for rule, margin in seen.margins.items()}
        if distance is not None:
            arrays["distance"] = distance
        return cls({name: _numpy(array) for name, array in arrays.items()}, seen.num_samples, spent)

    @classmethod
    def joined(cls, parts: Sequence["Record"]) -> "Record":
        """The records of all chunks, in order, as one."""
        arrays = {
            name: np.concatenate([part.arrays[name] for part in parts], axis=int(name.startswith(BY_VERDICT)))
            for name in parts[0].arrays
        }
        counts = zip(*(part.spent[1:] for part in parts), strict=True)
        return cls(arrays, parts[0].num_samples, Spent(parts[0].spent.attack_samples, *map(sum, counts)))

    def where(self, mask: np.ndarray, other: "Record") -> "Record":
        """This record for some examples, another one for the rest; the cost is this one's."""
        arrays = {}
        for name, here in self.arrays.items():
            if name in other.arrays:
                shaped = mask if here.ndim == 1 or name.startswith(BY_VERDICT) else mask[:, None]
                arrays[name] = np.where(shaped, here, other.arrays[name])
        return Record(arrays, self.num_samples, self.spent)

    @property
    def rules(self) -> list[str]:
        """The names of the rules."""
        return [name.removeprefix(BY_VERDICT) for name in self.arrays if name.startswith(BY_VERDICT)]


def _numpy(array: Tensor) -> np.ndarray:
    values = array.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
