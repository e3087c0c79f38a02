"""Fitting a defense: the loop, checkpoints, validation, schedules, averages, statistics of BatchNorm."""

from probdefense.training.averages import ema, swa
from probdefense.training.checkpoints import Checkpoints
from probdefense.training.history import History
from probdefense.training.loop import fit
from probdefense.training.recalibration import recalibrate
from probdefense.training.schedules import PerStep
from probdefense.training.swag import Swag
from probdefense.training.validation import Validation

__all__ = ["Checkpoints", "History", "PerStep", "Swag", "Validation", "ema", "fit", "recalibrate", "swa"]
