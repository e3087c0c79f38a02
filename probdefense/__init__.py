"""Adversarial defenses as probabilistic programs.

A defense is a Pyro model and its guide. Call it and you get logits with a sample axis; attack them,
average them, certify them, or hand them to ArviZ.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from probdefense import attacks, checks, data, defenses, models, nn, objectives
from probdefense.adaptation import rmc
from probdefense.checks import detection
from probdefense.core import Defense, deterministic, load, save
from probdefense.evaluation import (
    Certificate,
    Comparison,
    Report,
    calibration,
    certify,
    compare,
    compare_all,
    evaluate,
    with_draws,
)
from probdefense.logits import losses, rules
from probdefense.logits.adapters import counted
from probdefense.objectives import LossModule
from probdefense.prediction import Prediction, predict
from probdefense.training import History, fit, recalibrate

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
    "load",
    "losses",
    "models",
    "nn",
    "numpyro",
    "objectives",
    "predict",
    "recalibrate",
    "rmc",
    "rules",
    "save",
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
