"""End a run: its job, or its process on this host. The run saves its step first."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from sparse_llm_ft.cluster import slurm
from sparse_llm_ft.cluster.job_folder import forbid_attempts
from sparse_llm_ft.cluster.state import read_state
from sparse_llm_ft.cluster.status import RunView, view_runs
from sparse_llm_ft.distributed.world import node_name
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.run_folder import RunFolder

WAIT_SECONDS = 60.0
"""For the run to save and leave: twice Slurm's default KillWait."""


def cancel(folder: RunFolder, wait: float = WAIT_SECONDS) -> str:
    """Cancel a run and wait until it has left; returns a line about it.

    Raises:
        UserError: it does not run, or not here; or it does not leave in time.
    """
    (view,) = view_runs([folder])
    state = view.state
    if state is None or not view.is_alive:
        said = f"{view.word} ({view.note})" if state is None else view.word
        raise UserError(f"{folder.path}: {said}; expected a run that is pending or running")
    keeps_job = False
    if view.job is not None and view.job_id is not None:
        if slurm.is_batch(view.job_id):
            forbid_attempts(folder, "cancelled")  # also those of a chain's next jobs
            for job in (*reversed(view.later_ids), view.job_id):
                slurm.cancel(job)
        elif view.job.runs:
            slurm.terminate_steps(view.job_id)  # an interactive allocation is its user's, and may stay
            keeps_job = True
        else:
            slurm.cancel(view.job_id)
    elif state.host == node_name() and state.pid is not None and _is_run(state.pid):
        os.kill(state.pid, signal.SIGTERM)
    else:
        job = f"in job {state.job_id}, which Slurm does not know here" if state.job_id else "without a job"
        note = f" ({view.note})" if view.note else ""
        raise UserError(f"{folder.path}: runs on {state.host} {job}{note}; expected this command there")
    _wait(folder, view, wait, keeps_job)
    ended = read_state(folder.path)
    if ended is not None and ended.state != "completed":
        ended.failed("cancelled", ended.message or "before it began").write(folder.path)
    return f"{folder.path}: cancelled" + (f" ({ended.message})" if ended and ended.message else "")


def _is_run(pid: int) -> bool:
    """Whether the process is one of this package's: state.json may be old, or somebody else's."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return any(name in command for name in (b"sparse_llm_ft", b"sparse-llm-ft", b"train.py"))


def _wait(folder: RunFolder, view: RunView, seconds: float, keeps_job: bool) -> None:
    """Wait until the run has left; if its job stays (`keeps_job`), until its own word says so.

    Raises:
        UserError: it does not.
    """
    end = time.monotonic() + seconds
    while view.is_alive:
        said = read_state(folder.path) if keeps_job else None
        if said is not None and said.state != "running":
            return
        if time.monotonic() > end:
            raise UserError(f"{folder.path}: has not left {seconds:.0f} s after SIGTERM; look at it with `status`")
        time.sleep(1.0)
        (view,) = view_runs([folder])
