"""launch/train.py with a fault: FAULTS holds `what:rank:place`, separated by spaces. Rank -1 is every rank.

what is a signal (`USR1`, `TERM`, `KILL`, `STOP`) that the rank sends itself, `exit`, `nan` (the loss), or `full`
(metrics.jsonl becomes /dev/full). place is `step-N`, `step-N-` (and all later ones) or `writing-NAME`, when a file or
folder of that name is put in place.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparse_llm_ft.checkpoint.state import Progress
from sparse_llm_ft.evaluation import evaluator
from sparse_llm_ft.io import atomic
from sparse_llm_ft.objectives.language_modeling import CompletionObjective
from sparse_llm_ft.run_folder import RunFolder
from sparse_llm_ft.training.loop import Loop

rank = int(os.environ.get("RANK", "0"))
faults = [fault.split(":") for fault in os.environ["FAULTS"].split()]
mine = [(what, place) for what, where, place in faults if int(where) in (rank, -1)]
step = 0


def happens(what: str) -> None:
    sys.stdout.write(f"rank {rank}: {what}\n")
    sys.stdout.flush()
    if what == "exit":
        os._exit(7)
    os.kill(os.getpid(), getattr(signal, f"SIG{what}"))


def is_now(place: str) -> bool:
    first = int(place.split("-")[1])
    return step == first or (place.endswith("-") and step > first)


def in_step(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(loop: Loop, progress: Progress, thread: Any) -> Any:
        global step
        step = progress.step + 1
        for what, place in mine:
            if place.startswith("step-") and what not in ("nan", "full") and is_now(place):
                happens(what)
        return function(loop, progress, thread)

    return wrapper


def with_loss(function: Callable[..., Any]) -> Callable[..., Any]:
    """An infinite loss with finite gradients: what a target of probability 0 gives."""

    def wrapper(self: Any, forward: Any, batch: Any) -> torch.Tensor:
        loss = function(self, forward, batch)
        bad = torch.is_grad_enabled() and any(what == "nan" and is_now(place) for what, place in mine)
        return loss + torch.inf if bad else loss

    return wrapper


def while_writing(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(path: Path) -> None:
        for what, place in mine:
            if place.removeprefix("writing-") in path.parts:
                happens(what)
        function(path)

    return wrapper


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(folder: RunFolder, record: Any) -> None:
        if any(what == "full" and is_now(place) for what, place in mine):
            (folder.path / "metrics.jsonl").unlink()
            (folder.path / "metrics.jsonl").symlink_to("/dev/full")
        function(folder, record)

    return wrapper


def measured(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for what, place in mine:
            if place == "measuring":
                happens(what)
        return function(*args, **kwargs)

    return wrapper


Loop._step = in_step(Loop._step)
atomic._sync = while_writing(atomic._sync)
RunFolder.log = logged(RunFolder.log)
evaluator.mean_loss = measured(evaluator.mean_loss)
CompletionObjective.loss = with_loss(CompletionObjective.loss)
runpy.run_path(os.environ["TRAIN"], run_name="__main__")
