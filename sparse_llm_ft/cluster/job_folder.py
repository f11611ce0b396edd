"""What `submit` and batch scripts leave each other in a run's job folder: which jobs there are, and what may begin."""

from __future__ import annotations

import re

from sparse_llm_ft.io.atomic import write_file
from sparse_llm_ft.run_folder import RunFolder

_STOPPED, _SUBMISSION, _JOBS = "stopped", "submission", "jobs"
_JOB = re.compile(r"[0-9]+(_[0-9]+)?")

MOST_JOBS = 1000
"""Of a chain."""


def forbid_attempts(folder: RunFolder, line: str) -> None:
    """Let no attempt begin until the run is submitted again.

    Args:
        line: why.

    Raises:
        OSError: the file cannot be written.
    """
    write_file(folder.job / _STOPPED, f"{line}; `sparse-llm-ft submit` starts it again\n")


def allow_attempts(folder: RunFolder, submission: str) -> None:
    """Let attempts begin again, but none of jobs that an earlier `submit` has left. Whoever submits the run anew counts
    failures anew.

    Args:
        submission: the mark in the new batch script.

    Raises:
        OSError: the file that stops them cannot be removed, or the mark not written.
    """
    write_file(folder.job / _SUBMISSION, f"{submission}\n")  # first: a job that still waits may begin in between
    (folder.job / _STOPPED).unlink(missing_ok=True)


def is_stopped(folder: RunFolder) -> bool:
    """Whether no attempt may begin until the run is submitted again."""
    return (folder.job / _STOPPED).is_file()


def why_stopped(folder: RunFolder) -> str:
    """The line of `forbid_attempts`.

    Raises:
        OSError: there is none.
    """
    return (folder.job / _STOPPED).read_text(encoding="utf-8", errors="replace").strip()


def last_submission(folder: RunFolder) -> str:
    """The mark of the last `submit`; empty if there was none.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return (folder.job / _SUBMISSION).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return ""


def write_jobs(folder: RunFolder, jobs: list[str]) -> None:
    """Note the jobs of a `submit`, of a chain several, in their order.

    Raises:
        OSError: they cannot be written.
    """
    write_file(folder.job / _JOBS, "".join(f"{job}\n" for job in jobs))


def read_jobs(folder: RunFolder) -> list[str]:
    """The jobs of the last `submit`; none where nobody can tell."""
    try:
        lines = (folder.job / _JOBS).read_text(encoding="utf-8", errors="replace").split("\n", MOST_JOBS)[:MOST_JOBS]
    except OSError:
        return []
    return [line for line in lines if _JOB.fullmatch(line)]
