"""Files of defenses: tensors as safetensors, and how they were built as JSON in the same file.

Nothing is pickled and nothing unpickled. A file holds the state of a defense, its settings included, the
builder calls that made it, its sites, the versions of the libraries, notes, and a checksum over all of it.
"""

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from probdefense.core.defense import Defense
from probdefense.core.registry import Call, Unrecordable, repeated
from probdefense.files import checksum as _checksum
from probdefense.files import whole
from probdefense.validation import plain

FORMAT = 1
"""The version of the layout of a file; a higher one is refused."""

LIBRARIES = ("probdefense", "torch", "pyro-ppl", "safetensors")

Place = str | os.PathLike[str]


def save(defense: Defense, path: Place, **notes: Any) -> None:
    """Writes a defense to a file, whole or not at all.

    The file holds the parameters, buffers and settings, and the builder calls that made the defense, with
    their arguments. A network of `probdefense.models`, of layers of ``torch.nn``, or a stack of these, is in
    it by names and arguments, for the command; any other is code and is not in it: see `load`.

    Args:
        defense: What to write; of an adaptive defense its base.
        path: Where to; ``.safetensors`` is the usual ending.
        notes: Anything else that JSON can hold, such as the accuracy or the mean and deviation of the data;
            ``defense.notes`` has it after a load.

    Raises:
        TypeError: not a `Defense`, or notes that JSON cannot hold.
        ValueError: a state that is not all tensors.
        OSError: the file cannot be written.

    Examples:
        >>> import tempfile, probdefense as pd
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(pd.defenses.rse(pd.models.small_cnn()), f"{folder}/rse.safetensors", accuracy=0.97)
        ...     load(f"{folder}/rse.safetensors", net=pd.models.small_cnn()).notes
        {'accuracy': 0.97}
    """
    if not isinstance(defense, Defense):
        raise TypeError(
            f"expected a Defense, got {type(defense).__name__}; of an adaptive defense save the one that "
            "it was made of, of a plain network deterministic(net)"
        )
    tensors = {name: _own(name, value) for name, value in defense.state_dict().items()}
    text = _header(defense, notes)
    metadata = {"probdefense": text, "checksum": _checksum(text, tensors)}
    content = to_bytes(tensors, metadata)
    with whole(Path(path)) as partial:
        partial.write_bytes(content)


def load(path: Place, *, net: Any = None, defense: Defense | None = None) -> Defense:
    """Reads a defense that `save` wrote.

    Args:
        path: The file.
        net: A network like the one that the defense was built from, whose own weights do not matter; it goes
            through the recorded builder calls. Of an ensemble, one network or all.
        defense: In place of `net`, a defense built as the one that was saved, which is filled; needed where
            an argument was a function, which no file can hold, or the model and guide are your own.

    Returns:
        The defense, in the mode in which it was saved.

    Raises:
        ValueError: not such a file, a part of one, one that was changed or that a newer version wrote, or a
            network or defense that does not fit; says what differs.
        TypeError: both or neither of `net` and `defense`.
        OSError: the file cannot be read.

    Examples:
        >>> load("absent.safetensors", net=torch.nn.Linear(2, 2))
        Traceback (most recent call last):
        ...
        FileNotFoundError: [Errno 2] No such file or directory: 'absent.safetensors'
    """
    found, tensors = _read(Path(path))
    if (net is None) == (defense is None) or not isinstance(defense, Defense | None):
        raise TypeError(
            "expected either net=, a network like the one that was defended, or defense=, a Defense built as "
            f"the one that was saved ({_told(found)}), got both or neither; give one of them"
        )
    made = defense if defense is not None else _rebuilt(found, net, Path(path))
    _check_sites(found["sites"], made, Path(path))
    check_fit(tensors, made, Path(path))
    made.load_state_dict(tensors)
    made.notes = dict(found["notes"])
    return made.train(found["training"])


def header(path: Place) -> dict[str, Any]:
    """What a file says of its defense: calls, sites, num_data, versions and notes.

    Args:
        path: A file that `save` wrote.

    Returns:
        The header as plain data.

    Raises:
        ValueError: not such a file, see `load`.
        OSError: the file cannot be read.
    """
    return _read(Path(path))[0]


def check_fit(tensors: Mapping[str, Tensor], module: nn.Module, path: Path) -> None:
    """Refuses tensors that are not the state of a module.

    Raises:
        ValueError: names what is missing, left over, or of another shape or type.
    """
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    both = [name for name in own if name in tensors and not name.endswith("_extra_state")]
    faults = {
        "missing": [n for n in own if n not in tensors and not n.endswith("num_batches_tracked")],
        "left over": [n for n in tensors if n not in own],
        "of another shape": [
            f"{n} {tuple(tensors[n].shape)} for {tuple(own[n].shape)}"
            for n in both
            if tensors[n].shape != own[n].shape
        ],
        "of another type": [
            f"{n} {tensors[n].dtype} for {own[n].dtype}"
            for n in both
            if tensors[n].is_floating_point() and tensors[n].dtype != own[n].dtype
        ],
    }
    said = [f"{fault}: {_some(names)}" for fault, names in faults.items() if names]
    if said:
        raise ValueError(
            f"expected the tensors of {type(module).__name__} in {path}, got others ({'; '.join(said)}); "
            "build it as the one that was saved"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")


def _own(name: str, value: Any) -> Tensor:
    """A copy of a tensor of the state: what is shared there is written twice."""
    if not isinstance(value, Tensor):
        raise ValueError(
            f"expected a state of tensors, got {type(value).__name__} at {name!r}; let get_extra_state of "
            "that module return a tensor"
        )
    return value.detach().cpu().clone().contiguous()


def _header(defense: Defense, notes: Mapping[str, Any]) -> str:
    held = {name: plain(value) for name, value in {**defense.notes, **notes}.items()}
    try:
        json.dumps(held)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"expected notes that JSON can hold, got others ({error}); give numbers, texts and lists"
        ) from error
    return json.dumps(
        {
            "format": FORMAT,
            "libraries": {name: _version(name) for name in LIBRARIES} | {"python": platform.python_version()},
            "calls": None if defense.calls is None else [call._asdict() for call in defense.calls],
            "network": defense.origin,
            "sites": _sites(defense),
            "num_data": defense.num_data,
            "training": defense.training,
            "notes": held,
        },
        sort_keys=True,
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from its folder
        return "unknown"


def _sites(defense: Defense) -> dict[str, int | None]:
    """The number of elements of every site; None where every example has its own."""
    return {name: None if site.local else site.size for name, site in defense.sites.items()}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file.

    Raises:
        ValueError: it is none of ours, or not as it was written.
    """
    with path.open("rb") as file:
        start = file.read(4)
    wanted = f"expected a file of probdefense.save in {path}"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        raise ValueError(
            f"{wanted}, got one of torch.save; read it with probdefense.models.load_weights(net, path)"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"{wanted}, got something else or a part of one; save or fetch it anew") from error
    if "probdefense" not in metadata:
        raise ValueError(
            f"{wanted}, got tensors of another program; read them with "
            "probdefense.models.load_weights(net, path)"
        )
    found = _parsed(metadata["probdefense"], wanted)
    if metadata.get("checksum") != _checksum(metadata["probdefense"], tensors):
        raise ValueError(
            f"{wanted}, got one that was changed or damaged (its checksum differs); save or fetch it anew"
        )
    return found, tensors


KEYS = {
    "libraries": dict,
    "calls": list | None,
    "sites": dict,
    "num_data": int | None,
    "training": bool,
    "notes": dict,
}
"""What a header holds, beside its format."""


def _parsed(text: str, wanted: str) -> dict[str, Any]:
    damaged = f"{wanted}, got one whose header was changed or damaged; save or fetch it anew"
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(damaged) from error
    if not isinstance(found, dict) or type(found.get("format")) is not int:
        raise ValueError(damaged)
    if found["format"] > FORMAT:
        raise ValueError(
            f"{wanted} of format {FORMAT}, got format {found['format']}, which a newer version wrote; update "
            "probdefense"
        )
    if not all(key in found and isinstance(found[key], kind) for key, kind in KEYS.items()):
        raise ValueError(damaged)
    if not isinstance(found.setdefault("network", None), dict | None):  # older files have none
        raise ValueError(damaged)
    if not all(map(_is_call, found["calls"] or ())):
        raise ValueError(damaged)
    return found


def _is_call(call: Any) -> bool:
    match call:
        case {"builder": str(), "arguments": dict(), "members": int() | None}:
            return len(call) == len(Call._fields)
    return False


def _rebuilt(found: dict[str, Any], net: Any, path: Path) -> Defense:
    """What the recorded calls make of a network."""
    way = "build it and pass it as defense="
    if found["calls"] is None:
        raise ValueError(f"the defense in {path} was not made by builders alone; {way}")
    try:
        made = repeated([Call(**call) for call in found["calls"]], net)
    except Unrecordable as error:
        raise ValueError(f"the defense in {path} cannot be built from its record: {error}; {way}") from error
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"the network does not go through the calls that made the defense in {path} ({_told(found)}): "
            f"{error}; pass one like it, or {way}"
        ) from error
    if not isinstance(made, Defense):
        raise ValueError(f"the defense in {path} has no calls of builders in its record; {way}")
    return made


def _told(found: dict[str, Any]) -> str:
    """The calls in a few words."""
    calls = found["calls"]
    return " and then ".join(call["builder"] for call in calls) if calls else "your own model and guide"


def _check_sites(sites: dict[str, Any], defense: Defense, path: Path) -> None:
    own = _sites(defense)
    if sites != own:
        either = dict.fromkeys((*sites, *own))
        differ = _some([name for name in either if sites.get(name, "none") != own.get(name, "none")])
        raise ValueError(
            f"expected a defense with the sites in {path}, got another at {differ}; build it as "
            "the one that was saved"
        )
