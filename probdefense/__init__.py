"""Adversarial defenses as probabilistic programs.

A defense is a Pyro model and its guide. Call it and you get logits with a sample axis; attack them,
average them, certify them, or hand them to ArviZ.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from probdefense import (
    attacks,
    calibration,
    checks,
    data,
    defenses,
    detection,
    losses,
    models,
    nn,
    objectives,
    rules,
)
from probdefense.adaptation import rmc
from probdefense.adapters import counted
from probdefense.certification import Certificate, certify
from probdefense.comparison import Comparison, compare, compare_all
from probdefense.defense import Defense, deterministic
from probdefense.evaluation import evaluate, with_draws
from probdefense.objectives import LossModule
from probdefense.prediction import Prediction, predict
from probdefense.recalibration import recalibrate
from probdefense.report import Report
from probdefense.training import History, fit

if TYPE_CHECKING:
    from probdefense import analysis, numpyro
    from probdefense.analysis import to_arviz

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "Comparison",
    "Defense",
    "History",
    "LossModule",
    "Prediction",
    "Report",
    "analysis",
    "attacks",
    "calibration",
    "certify",
    "checks",
    "compare",
    "compare_all",
    "counted",
    "data",
    "defenses",
    "detection",
    "deterministic",
    "evaluate",
    "fit",
    "losses",
    "models",
    "nn",
    "numpyro",
    "objectives",
    "predict",
    "recalibrate",
    "rmc",
    "rules",
    "to_arviz",
    "with_draws",
]


def __getattr__(name: str) -> Any:
    """What needs ArviZ, NumPyro or matplotlib is imported when it is asked for."""
    if name in ("analysis", "numpyro"):
        return import_module(f"probdefense.{name}")
    if name == "to_arviz":
        return import_module("probdefense.analysis").to_arviz
    raise AttributeError(f"module 'probdefense' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
