"""Adversarial defenses as probabilistic programs.

A defense is a Pyro model and its guide. Call it and you get logits with a sample axis; attack them,
average them, certify them, or hand them to ArviZ.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probdefense import analysis, attacks, checks, data, defenses, models, nn, numpyro, objectives
    from probdefense.adaptation import rmc
    from probdefense.analysis import to_arviz
    from probdefense.checks import detection
    from probdefense.core import Defense, deterministic, load, priors, save
    from probdefense.evaluation import (
        Certificate,
        Comparison,
        PosteriorCertificate,
        Report,
        calibration,
        certify,
        certify_posterior,
        compare,
        compare_all,
        evaluate,
        with_draws,
        worst_over_norms,
    )
    from probdefense.logits import losses, rules
    from probdefense.logits.adapters import counted
    from probdefense.objectives import LossModule
    from probdefense.prediction import Prediction, predict
    from probdefense.training import History, fit, recalibrate

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "Comparison",
    "Defense",
    "History",
    "LossModule",
    "PosteriorCertificate",
    "Prediction",
    "Report",
    "analysis",
    "attacks",
    "calibration",
    "certify",
    "certify_posterior",
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
    "priors",
    "recalibrate",
    "rmc",
    "rules",
    "save",
    "to_arviz",
    "with_draws",
    "worst_over_norms",
]


ROOMS = (
    *("logits", "nn", "core", "defenses", "objectives", "training", "prediction", "attacks", "evaluation"),
    *("checks", "adaptation", "numpyro", "analysis", "data", "models", "study"),
)

HOMES = {
    **dict.fromkeys(("Defense", "deterministic", "load", "save"), "core"),
    **dict.fromkeys(
        ("Certificate", "Comparison", "Report", "calibration", "certify", "compare"), "evaluation"
    ),
    **dict.fromkeys(("PosteriorCertificate", "certify_posterior", "worst_over_norms"), "evaluation"),
    **dict.fromkeys(("compare_all", "evaluate", "with_draws"), "evaluation"),
    **dict.fromkeys(("losses", "rules"), "logits"),
    **dict.fromkeys(("Prediction", "predict"), "prediction"),
    **dict.fromkeys(("History", "fit", "recalibrate"), "training"),
    "LossModule": "objectives",
    "counted": "logits.adapters",
    "priors": "core",
    "detection": "checks",
    "rmc": "adaptation",
    "to_arviz": "analysis",
}
"""Where the public names live."""


def __getattr__(name: str) -> Any:
    """Imports what is asked for: the help of the command needs no torch, most work no ArviZ or NumPyro."""
    if name in ROOMS:
        return import_module(f"probdefense.{name}")
    if name not in HOMES:
        raise AttributeError(f"module 'probdefense' has no attribute {name!r}")
    import_module("probdefense.defenses")  # so that `load` knows our builders
    home = f"probdefense.{HOMES[name]}"
    found = globals()[name] = getattr(import_module(home), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
