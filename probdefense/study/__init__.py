"""The command: what it trains, what it attacks with, the job, and what it prints."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probdefense.study.workshop import Recipe, Workshop, recipe

__all__ = ["Recipe", "Workshop", "recipe"]


def __getattr__(name: str) -> Any:
    """Recipes load torch, which the help of the command does not need."""
    if name in __all__:
        return getattr(import_module("probdefense.study.recipes"), name)
    raise AttributeError(f"module 'probdefense.study' has no attribute {name!r}")
