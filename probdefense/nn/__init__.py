"""Layers of a defended network, and the surgery that puts them into a trained one."""

from probdefense.nn.noise import Noise
from probdefense.nn.normalize import Normalize

__all__ = ["Noise", "Normalize"]
