"""Is it robust, or just noisy? A suite of checks that return verdicts with their evidence."""

from probdefense.checks import detection, protocol
from probdefense.checks.results import Check, Checks
from probdefense.checks.suite import run

__all__ = ["Check", "Checks", "detection", "protocol", "run"]
