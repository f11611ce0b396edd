"""SIGTERM, SIGUSR1 and SIGUSR2 ask a run to leave (NCCL may catch SIGUSR1).

The handler only records the signal; all ranks leave together later.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType

from sparse_llm_ft.errors import PreemptionRequested

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_caught: set[int] = set()


def catch_signals() -> None:
    """Record the signals from now on, so that none of them interrupts a write. Main thread only."""
    for number in SIGNALS:
        signal.signal(number, _note)


def caught() -> list[int]:
    """For each of `SIGNALS`, 1 if this process received it, else 0."""
    return [int(number in _caught) for number in SIGNALS]


def preempted_by(flags: Sequence[float]) -> str | None:
    """Name of the first received signal, from the sum of all ranks' `caught`; None without one."""
    return next((number.name for number, flag in zip(SIGNALS, flags, strict=True) if flag), None)


def exit_if_preempted() -> None:
    """Collective. Leave together if any rank was asked to; for places where nothing is left to save.

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
