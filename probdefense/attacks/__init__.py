"""Attacks: functions of anything that gives logits with a sample axis. One family, one file."""

from probdefense.attacks.fgsm import fgsm
from probdefense.attacks.pgd import pgd

__all__ = ["fgsm", "pgd"]
