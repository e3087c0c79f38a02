"""Adversarial defenses as probabilistic programs.

A defense is a Pyro model and its guide. Call it and you get logits with a sample axis; attack them,
average them, certify them, or hand them to ArviZ.
"""

from probdefense import attacks, checks, data, defenses, losses, models, nn, objectives, rules
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

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "Comparison",
    "Defense",
    "History",
    "LossModule",
    "Prediction",
    "Report",
    "attacks",
    "certify",
    "checks",
    "compare",
    "compare_all",
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
    "recalibrate",
    "rmc",
    "rules",
    "with_draws",
]
