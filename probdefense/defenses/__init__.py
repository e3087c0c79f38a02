"""Builders: one paper, one file, one function from a network (or a Defense) to a Defense."""

from probdefense.defenses.bayesian import bayesian
from probdefense.defenses.rse import rse

__all__ = ["bayesian", "rse"]
