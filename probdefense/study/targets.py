"""What a command judges: a name in a Python file, or a file of `probdefense.save`, as a `LogitsFn`."""

import copy
import inspect
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from probdefense import defenses, models
from probdefense.core import Defense, deterministic, load
from probdefense.core.networks import remade
from probdefense.core.persistence import header
from probdefense.data.scripts import named, own_names, run_file
from probdefense.files import check_file, nearest
from probdefense.logits.adapters import as_logits_fn
from probdefense.rng import forked
from probdefense.tables import listed
from probdefense.types import Inputs, Labels, LogitsFn
from probdefense.validation import check_answer, kind_of

__all__ = ["Target", "check_images", "target"]

KNOWN = defenses, models
"""What files name builders and networks of."""


class Target(NamedTuple):
    """A function to judge, under the name that it has in the report."""

    name: str
    logits_fn: LogitsFn


def target(where: str, weights: Path | None = None) -> Target:
    """What is to be judged, in evaluation mode.

    Args:
        where: ``FILE.py:NAME``, a network, a `Defense`, a `LogitsFn`, or a function that makes one; or a file
            of `probdefense.save` that knows its network.
        weights: Fills what ``FILE.py:NAME`` stands for: of a network from any file of weights or from one of
            `probdefense.save`, of a `Defense` from the latter.

    Raises:
        ValueError: neither, a file that fails, or weights that do not fit.
        TypeError: a name of something else.
        OSError: a file that cannot be read.

    Examples:
        >>> target("absent.pt")
        Traceback (most recent call last):
        ...
        ValueError: expected FILE.py:NAME or a file of probdefense.save, got absent.pt, which is neither
    """
    file, _, name = where.rpartition(":")
    if file.endswith(".py"):
        if weights is not None:
            _check_written(weights, "trained weights")
        return Target(name, _ready(_filled(looked_up(where), weights, where), where))
    path = Path(where)
    if path.suffix == ".py" and path.is_file():
        raise ValueError(f"expected FILE.py:NAME, got {where} without a name; {_offered(path)}")
    if not path.is_file():
        folder = f": {where} is a folder" if path.is_dir() else nearest(path)
        raise ValueError(
            f"expected FILE.py:NAME or a file of probdefense.save, got {where}, which is neither{folder}"
        )
    _check_written(path, "a file of probdefense.save")
    if weights is not None:
        raise ValueError(
            f"expected --weights beside FILE.py:NAME, got it beside {where}, which holds its own; leave one "
            "out"
        )
    return Target(path.stem, _ready(_loaded(path), where))


def looked_up(where: str) -> Any:
    """What ``FILE.py:NAME`` stands for; a function or class that takes nothing is called.

    Raises:
        ValueError: no such file or name, or it raises something; says what.
    """
    file, _, name = where.rpartition(":")
    found = getattr(run_file(Path(file)), name, None)
    if isinstance(found, nn.Module) or (_answers(found) and not inspect.isclass(found)) or _takes(found):
        return found
    with forked(0):  # what it draws, such as the weights of a network, is the same in every run
        return named(where)


def _check_written(path: Path, what: str) -> None:
    """Refuses what is no file, or has nothing in it."""
    check_file(path, what)
    if not path.stat().st_size:
        raise ValueError(f"expected {what} in {path}, got something else: it is empty; save or fetch it anew")


def _offered(path: Path) -> str:
    """What of a file could be judged: defenses, networks, and what makes one without arguments."""
    module = run_file(path)
    names = [name for name in own_names(module) if _is_target(getattr(module, name))]
    if not names:
        return "nothing in it is a network, a Defense, or a function that makes one without arguments"
    return f"it has {listed(names[:20])}: give {path}:{names[0]}"


def _is_target(found: Any) -> bool:
    """Whether something in a file looks like what can be judged; no function is called."""
    if isinstance(found, nn.Module) or inspect.isclass(found):
        return isinstance(found, nn.Module) or issubclass(found, nn.Module)
    return _answers(found) or (inspect.isroutine(found) and (not _takes(found) or _takes_images(found)))


def _takes_images(found: Any) -> bool:
    """Whether a function can be called as ``f(x)`` or ``f(x, num_samples)``."""
    signature = inspect.signature(found)
    for arguments in ((0,), (0, 1)):
        with suppress(TypeError):
            signature.bind(*arguments)
            return next(iter(signature.parameters), "") != "self"
    return False


def _takes(found: Any) -> bool:
    """Whether a function needs an argument, as a `LogitsFn` does."""
    return inspect.isroutine(found) and bool(_needed(found))


def _needed(found: Any) -> list[str]:
    """The arguments that a function cannot be called without."""
    parameters = inspect.signature(found).parameters.values()
    return [
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def _filled(found: Any, weights: Path | None, where: str) -> Any:
    """A function to judge, with the weights of a file if there is one."""
    if weights is None:
        return deterministic(found) if isinstance(found, nn.Module) and not _answers(found) else found
    made = copy.deepcopy(found)  # the file is run once, and what it made stays
    if isinstance(made, Defense):
        return load(weights, defense=made)
    if not isinstance(made, nn.Module) or _answers(made):
        raise TypeError(
            f"expected {where} as a network or a Defense, which --weights can fill, got "
            f"{type(found).__name__}"
        )
    return load(weights, net=made) if _is_ours(weights) else deterministic(models.load_weights(made, weights))


def _answers(found: Any) -> bool:
    """Whether it is a `LogitsFn` already."""
    return hasattr(found, "stochastic")


def _is_ours(path: Path) -> bool:
    """Whether a file claims to be one of `probdefense.save`."""
    try:
        with safe_open(path, framework="pt") as file:
            return "probdefense" in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return False


def _loaded(path: Path) -> Defense:
    """The defense of a file that knows its network."""
    try:
        found = header(path)["network"]
    except ValueError as error:
        told, _, way = str(error).partition("; read ")
        if "load_weights" not in way:  # which reads them in Python
            raise
        raise ValueError(
            f"{told}; such weights have no network: give the function that makes it, FILE.py:NAME --weights "
            f"{path}"
        ) from error
    if found is None:
        raise ValueError(
            f"the network of the defense in {path} is code of your own, which no file holds; give the "
            f"function that makes it, FILE.py:NAME --weights {path}"
        )
    return load(path, net=remade(found))


def _ready(found: Any, where: str) -> LogitsFn:
    """What answers to images, in evaluation mode.

    Raises:
        TypeError: something else.
    """
    if not callable(found) or (inspect.isroutine(found) and not _takes_images(found)):
        came = f"a function of ({', '.join(_needed(found))})" if callable(found) else kind_of(found)
        file = Path(where.rpartition(":")[0])
        raise TypeError(
            f"expected {where} as a network, a Defense, a LogitsFn or a function that makes one without "
            f"arguments, got {came}; {_offered(file)}"
        )
    return as_logits_fn(found.eval() if isinstance(found, nn.Module) else found)


def check_images(judged: Target, x: Inputs, y: Labels) -> None:
    """Refuses images or labels that a function has no answer for, by one pass over two of them.

    Args:
        judged: What is asked.
        x: ``(batch, *event)``.
        y: ``(batch,)``.

    Raises:
        ValueError: it raises something, answers with something else than logits, or has too few classes.
    """
    try:
        with torch.no_grad(), forked(0, x.device):
            logits = judged.logits_fn(x[:2], 1)
    except Exception as error:  # whatever the user's network says
        told = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{judged.name} does not take images of shape {tuple(x.shape[1:])} ({told}); give the data that "
            "it was made for"
        ) from error
    classes = check_answer(logits, len(x[:2]), f"the answer of {judged.name}").shape[-1]
    if int(y.max()) >= classes:
        raise ValueError(
            f"expected labels below {classes}, the classes of {judged.name}, got {int(y.max())}; give the "
            "data that it was made for"
        )
