"""The records of an evaluation: in memory, and in a folder that a later run, or another process, reads.

A record is written whole when its chunk is finished, so a job may end at any moment. The folder belongs to
one evaluation: another defense, setting, attack, version or other data are refused, naming the difference.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from probdefense.evaluation.arrays import exact
from probdefense.evaluation.examples import Chunk
from probdefense.evaluation.fingerprint import fingerprint
from probdefense.evaluation.points import Spent
from probdefense.evaluation.records import Record
from probdefense.evaluation.rows import Place
from probdefense.files import whole
from probdefense.processes import Processes
from probdefense.types import Attack, LogitsFn
from probdefense.validation import check_kind

ABOUT = "about"
"""Under this name a record holds what is no array."""


class Journal:
    """A folder of finished chunks.

    Args:
        folder: Made if needed.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        check_kind("journal", folder, (str, os.PathLike), "give the path of a folder")
        self.folder = Path(folder)

    def open(self, settings: Mapping[str, Any], logits_fn: LogitsFn, attacks: Mapping[str, Attack]) -> None:
        """Says what the folder is about, or checks that it is about the same.

        Raises:
            ValueError: it is about something else, or an attack or a defense has no fingerprint.
            OSError: it cannot be written.
        """
        content = {
            "probdefense": version(),
            "torch": torch.__version__,
            "threads": str(torch.get_num_threads()),
            **{name: json.dumps(value) for name, value in settings.items()},
            "defense": fingerprint(logits_fn, "defense"),
            **{f"attack {label}": fingerprint(attack, label) for label, attack in attacks.items()},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "journal.json"
        if not path.exists():
            with whole(path) as place:
                place.write_text(json.dumps(content, indent=2) + "\n")
            return
        try:
            found = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"expected the journal of an evaluation in {path}, got something else"
            ) from error
        differ = [name for name in {**found, **content} if found.get(name) != content.get(name)]
        if differ:
            raise ValueError(
                f"the journal in {self.folder} is of another evaluation: {', '.join(differ)} differ; give "
                "this one a folder of its own"
            )

    def read(self, place: Place, chunk: Chunk) -> Record | None:
        """The record of a finished chunk; None if there is none.

        Raises:
            ValueError: it was made of other examples, or it is damaged.
        """
        path = self._path(place, chunk)
        if not path.exists():
            return None
        try:
            with path.open("rb") as raw, np.load(raw) as file:
                arrays = {name: file[name] for name in file.files}
            about = json.loads(str(arrays.pop(ABOUT)))
        except Exception as error:  # a damaged archive fails in many ways
            raise ValueError(f"the record {path} is damaged; remove it, and its chunk runs again") from error
        if about["examples"] != examples_hash(chunk):
            raise ValueError(
                f"the journal in {self.folder} was made of other data: chunk {chunk.number} differs; give "
                "this evaluation a folder of its own"
            )
        return Record(arrays, about["num_samples"], Spent(*about["spent"]))

    def write(self, place: Place, chunk: Chunk, record: Record) -> None:
        """Keeps a finished chunk.

        Raises:
            OSError: it cannot be written.
        """
        about = {"examples": examples_hash(chunk), "num_samples": record.num_samples, "spent": record.spent}
        with whole(self._path(place, chunk)) as partial, partial.open("wb") as file:
            np.savez(file, **record.arrays, **{ABOUT: np.array(json.dumps(about))})  # type: ignore[arg-type]

    def _path(self, place: Place, chunk: Chunk) -> Path:
        label = hashlib.sha256(f"{place[0]}/{exact(place[1])}".encode()).hexdigest()[:12]
        return self.folder / f"{chunk.number:08d}-{label}.npz"


class Book(NamedTuple):
    """The records of this evaluation, and where they are kept."""

    records: dict[Place, dict[int, Record]]
    journal: Journal | None
    processes: Processes

    @classmethod
    def opened(
        cls,
        folder: str | os.PathLike[str] | None,
        processes: Processes,
        settings: Mapping[str, Any],
        logits_fn: LogitsFn,
        attacks: Mapping[str, Attack],
    ) -> "Book":
        """An empty book, with a journal if there is a folder: all processes share it, the first opens it."""
        journal = None if folder is None else Journal(folder)
        if journal is not None:
            with processes.first_alone():
                journal.open(settings, logits_fn, attacks)
        return cls({}, journal, processes)

    def takes(self, chunk: Chunk) -> bool:
        """Whether a chunk is for this process."""
        return chunk.number % self.processes.world == self.processes.rank

    def has(self, place: Place, chunk: Chunk) -> bool:
        """Whether a record is there already; one from the journal is taken over."""
        found = None if self.journal is None else self.journal.read(place, chunk)
        if found is not None:
            self.records.setdefault(place, {})[chunk.number] = found
        return found is not None

    def write(self, place: Place, chunk: Chunk, record: Record) -> None:
        """Keeps a record."""
        self.records.setdefault(place, {})[chunk.number] = record
        if self.journal is not None:
            self.journal.write(place, chunk, record)

    def joined(self) -> dict[Place, Record]:
        """The records of all chunks, of all processes, as one each: the same in every process."""
        parts: dict[Place, dict[int, Record]] = {}
        for records in self.processes.gathered(self.records):
            for place, of_place in records.items():
                parts.setdefault(place, {}).update(of_place)
        return {place: Record.joined([part[n] for n in sorted(part)]) for place, part in parts.items()}


def examples_hash(chunk: Chunk) -> str:
    """What tells the examples of a chunk from others."""
    return fingerprint((chunk.x, chunk.y), "data")


def version() -> str:
    """The version of probdefense."""
    from importlib.metadata import version as installed

    return installed("probdefense")
