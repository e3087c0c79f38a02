"""Names in Python files of the user's: ``FILE.py:NAME``."""

import difflib
import hashlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from probdefense.files import nearest

FILES: dict[str, Path] = {}
"""The files that were run, by the names of their modules, in that order: what another process needs."""


def named(where: str) -> Any:
    """What ``FILE.py:NAME`` stands for; a function or class is called without arguments.

    Args:
        where: The path of a Python file, a colon, and a name in it. The file is run.

    Returns:
        The object, or what it makes.

    Raises:
        ValueError: no such file or name, or the file or function raises something; says what.

    Examples:
        >>> named("absent.py:data")
        Traceback (most recent call last):
        ...
        ValueError: expected a Python file at absent.py, got none; give it as FILE.py:NAME
    """
    file, _, name = where.rpartition(":")
    module = run_file(Path(file))
    if not name.isidentifier() or not hasattr(module, name):
        known = own_names(module)
        near = difflib.get_close_matches(name, [each for each in vars(module) if each[0] != "_"], 1)
        raise ValueError(
            f"expected {name!r} in {file}, got a file of {', '.join(known[:20]) or 'nothing'}; "
            + (f"did you mean {near[0]}?" if near else "name one")
        )
    found = getattr(module, name)
    if not callable(found) or hasattr(found, "__getitem__"):
        return found
    try:
        return found()
    except Exception as error:  # whatever the user's function says
        raise ValueError(
            f"{name}() of {file} raised {_told(error)}; call it in Python to see where"
        ) from error


def own_names(module: ModuleType) -> list[str]:
    """The names of a file in its order, without what it imports."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and (getattr(value, "__module__", None) == module.__name__ or not _has_home(value))
    ]


def _has_home(value: Any) -> bool:
    """Whether a value is a function or class, and so knows the file that it comes from."""
    return inspect.isroutine(value) or inspect.isclass(value)


def run_file(path: Path) -> ModuleType:
    """The module of a file, run once and kept under a name of its own, so that its classes can be pickled.

    Raises:
        ValueError: no such file, or it raises something; says what.
    """
    if not path.is_file():
        raise ValueError(
            f"expected a Python file at {path}, got none; give it as FILE.py:NAME{nearest(path)}"
        )
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()  # the same in every process
    name = f"probdefense_file_{path.stem}_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"expected a Python file, got {path}; its name ends in .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file says
        del sys.modules[name]
        raise ValueError(f"{path} raised {_told(error)}; run it in Python to see where") from error
    FILES[name] = path.resolve()
    return module


def _told(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}{f': {lines[0]}' if lines else ''}"
