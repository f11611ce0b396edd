"""SIGTERM and SIGUSR1 ask a run to leave. A handler only notes it; the run leaves where all ranks do so together."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType

from sparse_llm_ft.errors import PreemptionRequested

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_caught: set[int] = set()


def catch_signals() -> None:
    """From now on the signals are only noted, so that none, nor a second one, cuts a write short. Main thread only."""
    for number in SIGNALS:
        signal.signal(number, _note)


def caught() -> list[int]:
    """For each of `SIGNALS` whether this process got it, 0 or 1."""
    return [int(number in _caught) for number in SIGNALS]


def preempted_by(flags: Sequence[float]) -> str | None:
    """The name of the signal to leave for, from the ranks' `caught` added up; None if there was none."""
    return next((number.name for number, flag in zip(SIGNALS, flags, strict=True) if flag), None)


def exit_if_preempted() -> None:
    """Leave together if any rank was asked to. Collective; for places where nothing is left to be saved.

    Raises:
        PreemptionRequested: on every rank.
    """
    import torch  # not before settings are checked
    import torch.distributed as dist

    flags = torch.tensor(caught(), device="cuda" if torch.cuda.is_available() else "cpu")
    if dist.is_initialized():
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    if name := preempted_by(flags.tolist()):
        raise PreemptionRequested(f"{name}: nothing new to save")


def _note(number: int, frame: FrameType | None) -> None:
    _caught.add(number)
