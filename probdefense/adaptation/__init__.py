"""Defenses that go on learning at run time."""

from probdefense.adaptation.cleansing import rmc

__all__ = ["rmc"]
