"""Recipes of one's own: in files that the command is given, and in packages that are installed."""

from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from probdefense.data.scripts import run_file
from probdefense.study.recipes import RECIPES

GROUP = "probdefense.recipes"
"""The entry points that name modules with recipes."""


def found(files: Sequence[Path]) -> None:
    """Puts the recipes of installed packages, and of these files, into the table.

    Raises:
        ValueError: a file or package that fails, or a name that is taken.
    """
    _installed()
    for file in files:
        module = run_file(file)
        if not any(recipe.make.__module__ == module.__name__ for recipe in RECIPES.values()):
            raise ValueError(
                f"expected recipes in {file}, got a file without any; put @probdefense.study.recipe(name, "
                "about=...) before a function there"
            )


@cache
def _installed() -> None:
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:  # whatever the package says
            raise ValueError(
                f"the recipes of the entry point {point.name} = {point.value} do not load "
                f"({type(error).__name__}: {error}); mend or uninstall that package"
            ) from error
