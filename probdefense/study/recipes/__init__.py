"""The systems of the table, each as one function: what is random, what is minimized, what attacks it.

To add one, write a function with `recipe` in the file of its kind, or in a new file that `ROOMS` names.
"""

from importlib import import_module

from probdefense.study.workshop import (
    BATCH,
    DECAY,
    INNER_STEPS,
    RECIPES,
    UNTUNED,
    VALIDATION,
    WARM_UP,
    Recipe,
    Rehearsal,
    Variant,
    Workshop,
    learning_rates,
    recipe,
)

__all__ = [
    "BATCH",
    "DECAY",
    "INNER_STEPS",
    "RECIPES",
    "UNTUNED",
    "VALIDATION",
    "WARM_UP",
    "Recipe",
    "Rehearsal",
    "Variant",
    "Workshop",
    "learning_rates",
    "recipe",
]

ROOMS = ("baselines", "noise", "features", "inputs", "weights", "posteriors", "adaptation")
"""Our files of recipes, in the order of the catalog."""

for room in ROOMS:
    import_module(f"{__name__}.{room}")
