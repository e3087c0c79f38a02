"""Adversarial defenses as probabilistic programs.

A defense is a Pyro model and its guide. Call it and you get logits with a sample axis; attack them,
average them, certify them, or hand them to ArviZ.
"""

from probdefense import attacks, data, defenses, losses, models, nn, objectives, rules
from probdefense.adapters import counted
from probdefense.defense import Defense, deterministic
from probdefense.evaluation import evaluate, with_draws
from probdefense.objectives import LossModule
from probdefense.prediction import Prediction, predict
from probdefense.report import Report
from probdefense.training import History, fit

__version__ = "0.1.0"

__all__ = [
    "Defense",
    "History",
    "LossModule",
    "Prediction",
    "Report",
    "attacks",
    "counted",
    "data",
    "defenses",
    "deterministic",
    "evaluate",
    "fit",
    "losses",
    "models",
    "nn",
    "objectives",
    "predict",
    "rules",
    "with_draws",
]
