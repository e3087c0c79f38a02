"""What checks return: verdicts with evidence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from probdefense.tables import format_table, html_table

COLUMNS = ("check", "verdict", "evidence")

Verdict = Literal["ok", "attack too weak", "defense masks", "fault", "cannot tell", "not applicable"]

MORE_BUDGET = "not enough budget to tell"
"""What a check says that sees something and cannot be sure of it."""


@dataclass(frozen=True)
class Check:
    """One verdict.

    Attributes:
        name: What was checked.
        verdict: ``"ok"``; ``"attack too weak"``, more effort gets through; ``"defense masks"``, it does
            not, so the gradient misleads; ``"fault"``, the function is not what it says; ``"cannot
            tell"``, something may be wrong and the budget or the function do not show it; or ``"not
            applicable"``.
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
        return self.verdict not in ("ok", "cannot tell", "not applicable")


def judged(name: str, fired: bool, wrong: Verdict, advice: str, evidence: dict[str, float]) -> Check:
    """A check that found something wrong, or nothing."""
    return Check(name, wrong, advice, evidence) if fired else Check(name, "ok", "", evidence)


def doubted(name: str, why: str, evidence: dict[str, float]) -> Check:
    """A check that saw too little to say anything."""
    return Check(name, "cannot tell", why, evidence)


def skipped(name: str, why: str) -> Check:
    """A check that has nothing to say here."""
    return Check(name, "not applicable", why)


def unapplied(checks: Iterable[Check]) -> str:
    """How many checks have nothing to say here, in words; empty for none.

    Examples:
        >>> unapplied([skipped("more draws", "nothing is random")] * 2)
        '2 do not apply'
    """
    count = sum(check.verdict == "not applicable" for check in checks)
    return f"{count} {'does' if count == 1 else 'do'} not apply" if count else ""


@dataclass(frozen=True, repr=False)
class Checks:
    """All verdicts of a run, in the order of the suite."""

    checks: tuple[Check, ...]

    def __repr__(self) -> str:
        return f"{self._found}\n{self.table()}"

    def _repr_html_(self) -> str:
        rows = [row | {"advice": check.advice} for row, check in zip(self._rows, self.checks, strict=True)]
        return html_table(rows, (*COLUMNS, "advice"), self._found)

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

    @property
    def unsure(self) -> list[Check]:
        """Those that cannot tell."""
        return [check for check in self.checks if check.verdict == "cannot tell"]

    def table(self) -> str:
        """Names, verdicts and evidence as aligned text, and what to do about what fired or is unsure."""
        advice = [f"{check.name}: {check.advice}" for check in [*self.fired, *self.unsure]]
        return "\n".join([format_table(self._rows, COLUMNS), *advice])

    @property
    def _found(self) -> str:
        counts = [sum(check.verdict != "not applicable" for check in self.checks), len(self.fired)]
        said = "{} checks apply, {} found something wrong, {} cannot tell".format(*counts, len(self.unsure))
        return ", ".join(filter(None, (said, unapplied(self.checks))))

    @property
    def _rows(self) -> list[dict[str, str]]:
        return [
            {
                "check": check.name,
                "verdict": check.verdict,
                "evidence": ", ".join(f"{name} {value:.3g}" for name, value in check.evidence.items()),
            }
            for check in self.checks
        ]
