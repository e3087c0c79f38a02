"""The sample axis and what can be asked of it: functions that answer with draws, rules, losses. No Pyro."""

from probdefense.logits import adapters, losses, rules

__all__ = ["adapters", "losses", "rules"]
