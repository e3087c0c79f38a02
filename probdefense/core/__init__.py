"""What a defense is: families, random sites, the model and guide made of them, and how they are drawn."""

from probdefense.core.defense import Defense, deterministic

__all__ = ["Defense", "deterministic"]
