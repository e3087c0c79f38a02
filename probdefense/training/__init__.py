"""Fitting a defense: the loop over batches, and statistics of BatchNorm under the posterior."""

from probdefense.training.loop import History, fit
from probdefense.training.recalibration import recalibrate

__all__ = ["History", "fit", "recalibrate"]
