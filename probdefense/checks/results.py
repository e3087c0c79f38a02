"""What checks return: verdicts with evidence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from probdefense.tables import format_table

Verdict = Literal["ok", "attack too weak", "defense masks", "fault", "not applicable"]


@dataclass(frozen=True)
class Check:
    """One verdict.

    Attributes:
        name: What was checked.
        verdict: ``"ok"``; ``"attack too weak"``, more effort gets through; ``"defense masks"``, it does
            not, so the gradient misleads; ``"fault"``, the function is not what it says; or
            ``"not applicable"``.
        advice: What it means and what to do.
        evidence: The numbers behind it.
    """

    name: str
    verdict: Verdict
    advice: str
    evidence: dict[str, float] = field(default_factory=dict)

    @property
    def fired(self) -> bool:
        """Whether something is wrong."""
        return self.verdict not in ("ok", "not applicable")


def judged(name: str, fired: bool, wrong: Verdict, advice: str, evidence: dict[str, float]) -> Check:
    """A check that found something wrong, or nothing."""
    return Check(name, wrong, advice, evidence) if fired else Check(name, "ok", "", evidence)


def skipped(name: str, why: str) -> Check:
    """A check that has nothing to say here."""
    return Check(name, "not applicable", why)


@dataclass(frozen=True)
class Checks:
    """All verdicts of a run, in the order of the suite."""

    checks: tuple[Check, ...]

    def __iter__(self) -> Iterator[Check]:
        return iter(self.checks)

    def __getitem__(self, name: str) -> Check:
        """The check of that name.

        Raises:
            ValueError: no such check.
        """
        for check in self.checks:
            if check.name == name:
                return check
        raise ValueError(f"unknown check {name!r}; known: {', '.join(check.name for check in self.checks)}")

    @property
    def fired(self) -> list[Check]:
        """Those that found something wrong."""
        return [check for check in self.checks if check.fired]

    def table(self) -> str:
        """Names, verdicts and evidence as aligned text, and what to do about what fired."""
        rows = [
            {
                "check": check.name,
                "verdict": check.verdict,
                "evidence": ", ".join(f"{name} {value:.3g}" for name, value in check.evidence.items()),
            }
            for check in self.checks
        ]
        advice = [f"{check.name}: {check.advice}" for check in self.fired]
        return "\n".join([format_table(rows, ("check", "verdict", "evidence")), *advice])
