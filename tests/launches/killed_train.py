"""launch/train.py with a SIGKILL at a given place: KILL_AT=name:count kills this rank when it gets there."""

from __future__ import annotations

import errno
import os
import runpy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sparse_llm_ft.io.atomic
import sparse_llm_ft.training.run as run
from sparse_llm_ft.training.loop import Loop

name, _, count = os.environ["KILL_AT"].partition(":")
calls = 0


def in_checkpoint(sync: Callable[[Path], None]) -> Callable[[Path], None]:
    """`sync`, but not for a file of a checkpoint that is being written and whose name begins with `count`."""

    def wrapper(path: Path) -> None:
        if path.parent.name.startswith(f".tmp-{count}"):
            if name == "torn":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    return wrapper


def killed_in(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but the process dies as call number `count` begins."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        global calls
        calls += 1
        if calls == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return wrapper


if name == "step":  # before an optimizer step
    Loop._step = killed_in(Loop._step)
elif name == "save":  # on rank 0 with the files written but not yet in place; rank 1 waits and dies with it
    sparse_llm_ft.io.atomic._sync = killed_in(sparse_llm_ft.io.atomic._sync)
elif name in ("torn", "full"):  # in the writing of a checkpoint of that name: the process dies, or the disk is full
    sparse_llm_ft.io.atomic._sync = in_checkpoint(sparse_llm_ft.io.atomic._sync)
elif name == "change":  # the old engine is gone, the new one not yet there
    run.grown_batch = killed_in(run.grown_batch)
elif name == "finish":  # trained, but nothing exported
    run.summarize = killed_in(run.summarize)
else:
    raise SystemExit(f"unknown place {name}")

runpy.run_path(os.environ["TRAIN"], run_name="__main__")
