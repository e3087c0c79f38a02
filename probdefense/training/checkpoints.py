"""Checkpoints of a training: its whole state in one file of safetensors, whose header holds the rest as JSON.

A file is written whole or not at all, so a training may be killed at any moment. Nothing is ever unpickled.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from probdefense.files import checksum, reserve, whole
from probdefense.validation import check_count

ENTRY = "probdefense training"
"""Under this name the header of a file holds what is no tensor."""

CHECKSUM = "checksum"
"""And under this one a hash of all of it."""

COPIES = 5
"""Weights, two moments of Adam, average and best weights."""

FORMAT = 1
"""The version of these files."""


@dataclass(frozen=True)
class Checkpoints:
    """A folder in which a training keeps its state, and from which it goes on when it is started again.

    Killed anywhere and started again with the same settings, a training on the CPU ends with the same bits.
    The state holds weights, optimizer, schedule, average, best weights, history, the random state of torch
    and of the loader's own generators, the place in the epoch, and what the objective counts; not the random
    state of NumPy and Python. Batches of an epoch that have been trained are loaded again and left out. The
    first Ctrl-C ends the training after the step that runs, and saves it.

    Args:
        folder: One training each; made if needed.
        keep: How many of the newest files stay.
        every: Steps between two files; those at the end of epochs are written in any case.

    Raises:
        ValueError: `keep` or `every` below 1.

    Examples:
        >>> import tempfile, probdefense as pd
        >>> batches = [(torch.rand(8, 4), torch.zeros(8).long())]
        >>> net = pd.deterministic(torch.nn.Linear(4, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pd.fit(net, batches, epochs=3, checkpoints=Checkpoints(folder), progress=False)
        ...     [path.name for path in Checkpoints(folder).paths()]
        ['epoch-00002-batch-00000000.safetensors', 'epoch-00003-batch-00000000.safetensors']
    """

    folder: str | os.PathLike[str]
    keep: int = 2
    every: int | None = None

    def __post_init__(self) -> None:
        check_count("keep", self.keep)
        if self.every is not None:
            check_count("every", self.every)

    def paths(self) -> list[Path]:
        """The files, oldest first."""
        return sorted(Path(self.folder).glob("epoch-*-batch-*.safetensors"))

    def prepare(self, defense: Any) -> None:
        """Refuses, before any work, a folder without room for a first file.

        Raises:
            OSError: it cannot be written.
        """
        state = [value for value in defense.state_dict().values() if isinstance(value, Tensor)]
        reserve(Path(self.folder), COPIES * sum(value.nbytes for value in state))

    def write(self, epoch: int, batch: int, state: Mapping[str, Any]) -> None:
        """Keeps a state and removes what is too old.

        Raises:
            OSError: it cannot be written; the files before it stay.
        """
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        about = {"format": FORMAT, "state": pack(state, tensors)}
        name = f"epoch-{epoch:05d}-batch-{batch:08d}.safetensors"
        text = json.dumps(about)
        content = save(tensors, {ENTRY: text, CHECKSUM: checksum(text, tensors)})
        with whole(Path(self.folder) / name) as place:  # save_file leaves scraps where it is killed
            place.write_bytes(content)
        for path in self.paths()[: -self.keep]:
            path.unlink(missing_ok=True)

    def latest(self) -> dict[str, Any] | None:
        """The newest state; None if there is none.

        Raises:
            ValueError: its file is damaged, of another program, or of a newer version.
        """
        from safetensors import safe_open

        paths = self.paths()
        if not paths:
            return None
        try:
            with safe_open(paths[-1], "pt") as file:
                metadata = file.metadata() or {}
                entry = metadata.get(ENTRY)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.get(CHECKSUM, "") not in ("", checksum(entry or "", tensors)):  # older ones have none
                raise ValueError("its checksum differs")
        except Exception as error:  # a damaged file fails in many ways
            raise ValueError(
                f"the checkpoint {paths[-1]} is damaged; remove it, and training goes on from the one before"
            ) from error
        about = json.loads(entry) if entry else {}
        if about.get("format") != FORMAT:
            raise ValueError(
                f"expected a checkpoint of training in format {FORMAT} in {paths[-1]}, got "
                f"{about.get('format', 'something else')}; use the version of probdefense that wrote it, or "
                "another folder"
            )
        return unpack(about["state"], tensors)


def pack(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """What JSON can say of nested containers; tensors go into `tensors` under their paths.

    Raises:
        TypeError: something else than containers, numbers, text and tensors.
    """
    if isinstance(tree, Tensor):
        tensors[name := path.lstrip("/")] = tree.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, list | tuple):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [pack(part, tensors, f"{path}/{i}") for i, part in enumerate(tree)]}
    if isinstance(tree, Mapping):
        kind = "counter" if isinstance(tree, Counter) else "dict"
        return {kind: [[key, pack(part, tensors, f"{path}/{key}")] for key, part in tree.items()]}
    raise TypeError(
        f"a checkpoint holds tensors, numbers and text, got {type(tree).__name__} in the state of "
        f"{path.strip('/').replace('/', '.')}; leave it out of its state_dict"
    )


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind in ("list", "tuple"):
        parts = [unpack(part, tensors) for part in content]
        return parts if kind == "list" else tuple(parts)
    items = {key: unpack(part, tensors) for key, part in content}
    return Counter(items) if kind == "counter" else items
