"""Fitting a defense: the loop over batches, schedules, averages of weights, and statistics of BatchNorm."""

from probdefense.training.averages import ema, swa
from probdefense.training.loop import History, fit
from probdefense.training.recalibration import recalibrate
from probdefense.training.schedules import PerStep

__all__ = ["History", "PerStep", "ema", "fit", "recalibrate", "swa"]
