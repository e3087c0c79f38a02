"""What a defense is: families, random sites, the model and guide made of them, and how they are drawn."""

from probdefense.core import priors
from probdefense.core.defense import Defense, deterministic
from probdefense.core.persistence import load, save

__all__ = ["Defense", "deterministic", "load", "priors", "save"]
