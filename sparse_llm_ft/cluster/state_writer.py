"""`StateWriter`: a running run's state.json, written by a thread, so that training never waits for the disk."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparse_llm_ft.cluster.state import (
    DEVICE_MEMORY_ADVICE,
    HOST_MEMORY_ADVICE,
    Reason,
    RunState,
    job_id,
    job_nodes,
    read_or_renew,
)
from sparse_llm_ft.distributed.exit_status import call_before_end
from sparse_llm_ft.distributed.world import World, node_name
from sparse_llm_ft.errors import (
    DivergedError,
    OutOfMemoryConfigError,
    PreemptionRequested,
    UserError,
    lacks_device_memory,
    lacks_host_memory,
    may_pass,
    reason_of,
)

WRITE_SECONDS, BEAT_SECONDS = 2.0, 20.0
"""Least time between two writes of progress, and most time between two writes at all."""

_LOGGER = logging.getLogger(__name__)
_BEGAN = time.time()  # about when the process began: its first imports bring this module along


class StateWriter:
    """Writes on rank 0; does nothing on other ranks.

    A write that fails is logged once and does not end the run.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        self._lock, self._disk, self._ended = threading.Lock(), threading.Lock(), threading.Event()
        self._state: RunState | None = None
        self._earlier_hours = 0.0
        self._pace: tuple[str, int, float] | None = None  # phase, its first step here, and when
        self._is_new, self._has_warned = False, False
        self._thread = threading.Thread(target=self._write_loop, name="run-state", daemon=True)

    def begin(self) -> None:
        """The run begins or continues, and this process holds its folder. Call once.

        Raises:
            OSError: the file cannot be written.
        """
        if self.world.rank != 0:
            return
        try:
            before = read_or_renew(self.folder)
        except UserError as error:
            _LOGGER.warning("%s; it is written anew", error)
            before = RunState()
        job = job_id()
        # The batch script has counted this attempt already, and knows when it began (`attempts.begin`).
        is_counted = before.state == "running" and before.pid is None and job is not None and before.job_id == job
        began = before.attempt_started if is_counted and before.attempt_started is not None else _BEGAN
        self._earlier_hours = before.gpu_hours
        self._state = before.updated_by(
            state="running",
            reason=None,
            message="",
            started=before.started or began,
            attempt_started=began,
            processes=self.world.size,
            host=node_name(),
            pid=os.getpid(),
            job_id=job,
            nodes=job_nodes(),
            attempt=before.attempt + (not is_counted),
            tokens_per_second=None,
            seconds_left=None,
        )
        self._stamped().write(self.folder)
        self._thread.start()
        call_before_end(lambda text: self._end(self._present().failed("node_failure", text)))

    def step(self, line: Mapping[str, Any], total: int, logged: bool) -> None:
        """Note a step's line of metrics.jsonl; without `logged` only where the run is."""
        if self._state is None:
            return
        with self._lock:
            step, phase, now = int(line["step"]), str(line["phase"]), time.monotonic()
            if self._pace is None or self._pace[0] != phase:
                self._pace = phase, step, now
            _, first, since = self._pace
            left = (total - step) * (now - since) / (step - first) if step > first else None
            changes: dict[str, Any] = {"step": step, "total_steps": total, "phase": phase, "seconds_left": left}
            if logged:
                changes |= {"loss": line["loss"], "tokens_per_second": float(line["tokens_per_second"])}
            self._state = self._state.model_copy(update=changes)
            self._is_new = True

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record how the body ends."""
        try:
            yield
        except PreemptionRequested as request:
            self._end(self._present().ended("preempted", str(request)))
            raise
        except KeyboardInterrupt:
            self._end(self._present().ended("preempted", "Ctrl-C: continues from the last checkpoint"))
            raise
        except Exception as error:
            # If another rank's death is behind it, `end_at_once` replaces this by the rank's name.
            self._end(self._present().failed(reason_of_failure(error), _message_of(error)))
            raise
        else:
            call_before_end(None)
            self._end(self._present().ended("completed"))

    def _present(self) -> RunState:
        return self._state or RunState()

    def _end(self, state: RunState) -> None:
        """Write the last state, if the run had begun."""
        if self._state is None:
            return
        self._ended.set()
        with self._lock:
            self._state = state
        self._write()

    def _write_loop(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(WRITE_SECONDS):
            if self._is_new or time.monotonic() - last >= BEAT_SECONDS:
                self._write()
                last = time.monotonic()

    def _write(self) -> None:
        try:
            with self._disk:  # held while a disk that has gone away blocks; `step` must not wait for it
                with self._lock:
                    self._is_new, state = False, self._stamped()
                state.write(self.folder)
        except OSError as error:
            if not self._has_warned:
                _LOGGER.warning("the run's state cannot be written (%s); the run continues", error)
            self._has_warned = True

    def _stamped(self) -> RunState:
        """The state as of now."""
        state, now = self._present(), time.time()
        hours = max(0.0, now - (state.attempt_started or now)) * self.world.size / 3600
        return state.model_copy(update={"updated": now, "gpu_hours": self._earlier_hours + hours})


def reason_of_failure(error: BaseException) -> Reason:
    """Why a run failed, from the error that ended it."""
    if isinstance(error, OutOfMemoryConfigError) or lacks_device_memory(error) or lacks_host_memory(error):
        return "out_of_memory"
    if isinstance(error, UserError):
        return "error" if may_pass(error) else "bad_setting"
    if isinstance(error, DivergedError):
        return "diverged"
    return "error"


def _message_of(error: BaseException) -> str:
    """The error in one line; where memory was lacking, with what would be right."""
    text = f"{type(error).__name__}: {reason_of(error, 1000)}"
    if lacks_device_memory(error):
        return f"{text}; {DEVICE_MEMORY_ADVICE}"
    return f"{text}; {HOST_MEMORY_ADVICE}" if lacks_host_memory(error) else text
