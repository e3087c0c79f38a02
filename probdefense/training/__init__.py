"""Fitting a defense: the loop over batches, schedules, and statistics of BatchNorm under the posterior."""

from probdefense.training.loop import History, fit
from probdefense.training.recalibration import recalibrate
from probdefense.training.schedules import PerStep

__all__ = ["History", "PerStep", "fit", "recalibrate"]
