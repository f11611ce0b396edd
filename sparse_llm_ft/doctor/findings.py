"""`Finding`: one line of the doctor's report. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from sparse_llm_ft.errors import reason_of


class Level(IntEnum):
    """How bad it is; the exit status of the command is the worst level."""

    OK = 0
    WARNING = 1  # a run works, but slower, or not in all settings
    PROBLEM = 2  # a run will fail


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and what to do.

    Attributes:
        advice: empty if there is nothing to do.
    """

    subject: str
    level: Level
    found: str
    advice: str = ""

    def __str__(self) -> str:
        line = f"{self.level.name.lower():<8} {self.subject}: {self.found}"
        return f"{line}; {self.advice}" if self.advice else line


Check = Callable[[], Iterable[Finding]]


def run_checks(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """Run each check; one that fails itself is a problem, and the others still run.

    Args:
        checks: (subject, check).
    """
    for subject, check in checks:
        try:
            yield from check()
        except Exception as error:  # whatever it is, the machine has it
            yield Finding(
                subject, Level.PROBLEM, f"{type(error).__name__}: {reason_of(error)}", "a run would fail here"
            )


def ok(subject: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(subject, Level.OK, found)


def warning(subject: str, found: str, advice: str) -> Finding:
    """A run works, with less."""
    return Finding(subject, Level.WARNING, found, advice)


def problem(subject: str, found: str, advice: str) -> Finding:
    """A run fails."""
    return Finding(subject, Level.PROBLEM, found, advice)
