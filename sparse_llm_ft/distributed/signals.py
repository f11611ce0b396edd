"""SIGTERM, SIGUSR1, SIGUSR2 (NCCL may catch SIGUSR1), SIGHUP and Ctrl-C ask a run to leave.

The handler only records the signal; all ranks leave together later. A second Ctrl-C ends the process at once, also if
the main thread waits in a collective.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType

from sparse_llm_ft.errors import NOTHING_NEW, PreemptionRequested

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
_REQUESTS = (*SIGNALS, signal.SIGPIPE)
"""SIGPIPE stands for an output that nobody reads any more: Python ignores the signal itself, which sockets send too."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as a shell's."""
ONE_CTRL_C = 1.0
"""Seconds within which several SIGINT are one: the terminal and a launcher may both send it."""
_caught: set[int] = set()


def catch_signals() -> None:
    """Record the signals from now on, so that none of them interrupts a write. Main thread only."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, _note)
    # Python's handler runs in the main thread, once it is back from C. A wakeup file gets each signal at once.
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_end_on_second_interrupt, args=(read,), name="interrupts", daemon=True).start()


def output_gone() -> None:
    """Ask this process to leave since nobody reads its output any more: whoever started it is gone."""
    _caught.add(signal.SIGPIPE)


def caught() -> list[int]:
    """For each request to leave, 1 if this process received it, else 0."""
    return [int(number in _caught) for number in _REQUESTS]


def preempted_by(flags: Sequence[float]) -> str | None:
    """Name of the first received signal, from the sum of all ranks' `caught`; None without one."""
    return next((number.name for number, flag in zip(_REQUESTS, flags, strict=True) if flag), None)


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
        raise PreemptionRequested(name, NOTHING_NEW)


def _note(number: int, frame: FrameType | None) -> None:
    _caught.add(number)


def _end_on_second_interrupt(signals_file: int) -> None:
    first: float | None = None
    while number := os.read(signals_file, 1):
        if number[0] != signal.SIGINT:
            continue
        if first is None:
            first = time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                os.write(2, b"stopping as soon as the present step is saved; Ctrl-C again stops at once\n")
        elif time.monotonic() - first > ONE_CTRL_C:
            os._exit(INTERRUPTED)
