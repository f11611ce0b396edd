"""How a process ends on an error: rank 0 prints one line, and the exit status tells whose fault it is."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from sparse_llm_ft.distributed import signals
from sparse_llm_ft.distributed.signals import INTERRUPTED
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import PreemptionRequested, TrainingError, UserError, may_pass

USER_ERROR, TRAINING_ERROR = 2, 1
REQUEUE = 75  # sysexits' EX_TEMPFAIL: nothing is wrong; run the same command again
_GRACE_SECONDS = 5.0
_UNUSABLE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "permission denied; expected a path that this user may use"),
    errno.ENAMETOOLONG: "too long for a path",
}
"""errno -> what is wrong with a path that the user gave, whatever has looked at it."""

_before_end: list[Callable[[str], None]] = []


def call_before_end(action: Callable[[str], None] | None) -> None:
    """Let `end_at_once` give its text to `action` first, in place of an earlier one; None: to nobody."""
    _before_end[:] = [] if action is None else [action]


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument like every other user error: one line, on rank 0."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError for `one_line_errors`."""
        raise UserError(message)


@contextmanager
def one_line_errors(world: World, debug: bool = False, resumes: bool = False) -> Iterator[None]:
    """Turn a `UserError` (and a path that the user may not or cannot use) into its line and exit status 2, a
    `TrainingError` (and a file server that is away) into its line and status 1, a `PreemptionRequested` into its line
    and status 75, after Ctrl-C 130.

    All ranks raise the same error, and rank 0 prints it. The others wait a moment before they exit, since launchers
    kill all processes when the first one fails. If the first process of another node is still alive then, and rank 0
    does not know of the error (`is_shared`), it may be its own (a file missing there), and it prints it too.

    Args:
        debug: print the error's stack before its line.
        resumes: whether the command, given again, continues where Ctrl-C has ended it.
    """
    try:
        try:
            yield
        except OSError as error:
            if error.filename is None or error.errno not in _UNUSABLE:
                raise
            raise UserError(f"{error.filename}: {_UNUSABLE[error.errno]}") from error
    except (UserError, TrainingError) as error:
        status = USER_ERROR if isinstance(error, UserError) and not may_pass(error) else TRAINING_ERROR
        if world.rank != 0:
            _wait_for_rank_zero()
        if world.rank == 0 or (world.local_rank == 0 and not error.is_shared):
            if debug:
                traceback.print_exc()
            where = f"rank {world.rank}: " if world.rank else ""
            print(f"error: {where}{error}", file=sys.stderr, flush=True)
        sys.exit(status)
    except PreemptionRequested as request:
        if world.rank == 0:
            print(f"{request}; the same command continues", file=sys.stderr, flush=True)
        else:
            _wait_for_rank_zero()
        sys.exit(INTERRUPTED if request.signal_name == signal.SIGINT.name else REQUEUE)
    except KeyboardInterrupt:
        if world.rank == 0:
            advice = "; the same command continues from the last checkpoint" if resumes else ""
            print(f"interrupted{advice}", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)


def _wait_for_rank_zero() -> None:
    """Let rank 0 print its line first. A launcher that ends this process, because rank 0 has left, ends the wait."""
    end = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < end and not any(signals.caught()):
        time.sleep(0.05)


def end_at_once(
    world: World, gone: set[int], text: str, status: int = TRAINING_ERROR, is_said: bool = False
) -> NoReturn:
    """End this process from any thread, with one line, because other ranks are `gone`.

    The first survivor of each node prints the line; the others wait a moment, as in `one_line_errors`.

    Args:
        is_said: whether one of those that are gone has printed it.
    """
    first = world.rank - world.local_rank
    if is_said or any(rank not in gone for rank in range(first, world.rank)):
        _wait_for_rank_zero()
    else:
        print(f"error: {text}", file=sys.stderr, flush=True)
    for action in _before_end:  # in a thread, since a file system that has gone away may block it forever
        recorder = threading.Thread(target=action, args=(text,), daemon=True)
        recorder.start()
        recorder.join(_GRACE_SECONDS)
    os._exit(status)  # the main thread may wait in a collective forever
