"""Prediction from draws: a fixed number of them, as many as it takes, or keyed by example."""

from probdefense.prediction.predictive import Prediction, predict

__all__ = ["Prediction", "predict"]
