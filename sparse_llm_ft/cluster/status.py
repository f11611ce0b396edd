"""What runs are doing: their own word in state.json, corrected by what Slurm and this host's processes say."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from sparse_llm_ft.cluster.job_folder import is_stopped, read_jobs
from sparse_llm_ft.cluster.slurm import Job, find_jobs, has_slurm
from sparse_llm_ft.cluster.state import HOST_MEMORY_ADVICE, Reason, RunState, read_state
from sparse_llm_ft.distributed.world import node_name
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.run_folder import CONFIG_FILE, STATE_FILE, RunFolder

SILENT_SECONDS = 90.0
"""A running run whose state is older has died, or its disk has gone away. It writes every 20 s."""

_REASONS: Mapping[str, Reason] = {
    "OUT_OF_MEMORY": "out_of_memory",
    "TIMEOUT": "timeout",
    "DEADLINE": "timeout",
    "NODE_FAIL": "node_failure",
    "BOOT_FAIL": "node_failure",
    "CANCELLED": "cancelled",
}
"""Slurm's last word on a job -> why its run failed; any other word does not say why."""

_WAITING: Mapping[str, str] = {
    "BeginTime": "Slurm holds a requeued job back for some two minutes",
    "Priority": "jobs of higher priority come first",
    "Resources": "no free nodes yet",
    "Dependency": "the job before it has not ended",
    "DependencyNeverSatisfied": "it will never begin; cancel it",
    "JobHeldUser": "held; `scontrol release` lets it go",
    "JobHeldAdmin": "held by the site",
    "ReqNodeNotAvail": "its nodes are down or reserved",
    "PartitionNodeLimit": "more nodes than the partition allows; it will not begin",
    "PartitionTimeLimit": "a longer --time than the partition allows; it will not begin",
    "launch failed requeued held": "it could not be started; look at its nodes, then `scontrol release` it",
}
"""Slurm's commonest reasons for which a job waits -> what they mean."""


@dataclass(frozen=True)
class RunView:
    """A run as it is now.

    Attributes:
        state: corrected; None where the folder holds a run that says nothing (of an earlier release).
        note: what the file does not say, such as why a job waits.
        job: Slurm's word on its job, if there is one.
        job_id: of this job, or of the last one that the run was in.
        later_ids: of a chain, those of its jobs that wait behind this one.
    """

    folder: RunFolder
    state: RunState | None
    note: str = ""
    job: Job | None = None
    job_id: str | None = None
    later_ids: tuple[str, ...] = ()

    @property
    def is_alive(self) -> bool:
        """Whether it runs, or will without anybody's doing."""
        if self.job is not None:
            return self.job.waits or self.job.runs
        return self.state is not None and self.state.state == "running"

    @property
    def word(self) -> str:
        """The state in a word or two: ``failed: out of memory``."""
        if self.state is None:
            return "unknown"
        reason = self.state.reason
        return f"{self.state.state}: {reason.replace('_', ' ')}" if reason else self.state.state


def find_runs(root: Path) -> Iterator[RunFolder]:
    """The runs in a folder, itself included, in the order of their names. Links are not followed.

    Raises:
        UserError: there is no such folder.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected a run's output_dir, or a folder with runs")
    for path, folders, files in os.walk(root):
        is_run = STATE_FILE in files or (CONFIG_FILE in files and "checkpoints" in folders)
        folders[:] = [] if is_run else sorted(name for name in folders if not name.startswith("."))
        if is_run:
            yield RunFolder(path)


def view_runs(folders: Sequence[RunFolder]) -> list[RunView]:
    """The runs as they are now; asks Slurm once for all of them. Where it does not answer, a note says so."""
    stored: list[tuple[RunFolder, RunState | None, str]] = []
    for folder in folders:
        try:
            stored.append((folder, read_state(folder.path), ""))
        except UserError as error:
            stored.append((folder, None, str(error)))
    silence = ""
    try:
        known = {folder.path: _jobs_of(folder, state) for folder, state, _ in stored if state is not None}
        jobs = find_jobs({job for ids in known.values() for job in ids})
    except UserError as error:
        jobs, silence = {}, f"Slurm was not asked: {error}"
    views = []
    for folder, state, problem in stored:
        if state is None:
            views.append(RunView(folder, None, problem or "no state.json"))
            continue
        # The run's own job, or the next one of its chain.
        alive = [job for job in known[folder.path] if job in jobs and (jobs[job].waits or jobs[job].runs)]
        job_id = next(iter(alive), state.job_id)
        view = judge(folder, state, jobs.get(job_id or ""), time.time())
        view = replace(view, job_id=job_id, later_ids=tuple(alive[1:]))
        note = silence
        if view.word == "pending" and job_id is not None and view.job is None and not silence and has_slurm():
            note = f"Slurm does not know job {job_id} any more: it ended before the run began"
        is_open = state.job_id is not None and state.state not in ("completed", "failed")
        views.append(replace(view, note="; ".join(filter(None, [view.note, note]))) if is_open else view)
    return views


def _jobs_of(folder: RunFolder, state: RunState) -> list[str]:
    """The job that the run is in, and the later ones of its chain, if they may begin it."""
    if state.job_id is None:
        return []
    chain = [] if is_stopped(folder) or folder.is_complete() else read_jobs(folder)
    return chain[chain.index(state.job_id) :] if state.job_id in chain else [state.job_id]


def judge(folder: RunFolder, state: RunState, job: Job | None, now: float) -> RunView:
    """One run as it is at `now`.

    Args:
        job: what Slurm says about its job; None: nothing, or it has none.
    """
    if folder.is_complete():
        return RunView(folder, state.ended("completed"), "", job)
    if job is not None and job.waits:  # at first, or once more
        died = state.state == "running" and state.pid is not None
        message = f"its last attempt died on {state.nodes}: a node failed, or it was killed" if died else state.message
        return RunView(folder, state.ended("pending", message), _why_it_waits(job, now), job)
    silent = now - state.updated
    if job is not None and job.runs:
        if state.state in ("preempted", "failed") and job.state == "COMPLETING":
            return RunView(folder, state, "its job is ending", job)
        if state.state in ("preempted", "failed") and silent > SILENT_SECONDS and _began_before(job, state):
            return RunView(folder, state)  # in an allocation that its user still has
        if state.state != "running":
            return RunView(folder, state.ended("running", state.message), "starting, or about to end", job)
        note = f"loading, or silent, for {silent:.0f} s" if silent > SILENT_SECONDS else ""
        return RunView(folder, state, note, job)
    ended = None if job is None else _REASONS.get(job.state.split()[0])
    if state.state in ("completed", "failed"):
        return RunView(folder, state, "", job)
    if job is not None and (ended is not None or state.state != "preempted"):
        message = f"Slurm says {job.state}" + (f" on {job.nodes}" if job.nodes else "")
        if ended == "out_of_memory":
            message = f"{message}; {HOST_MEMORY_ADVICE}"
        return RunView(folder, state.failed(ended or "killed", message), "", job)
    if state.state == "running" and (is_dead := _has_died(state, silent)):
        return RunView(folder, state.failed("killed", is_dead), "", job)
    return RunView(folder, state, "", job)


def _began_before(job: Job, state: RunState) -> bool:
    """Whether the job began before the run's last word, and so has not restarted since."""
    return job.start is not None and job.start.timestamp() < state.updated


def _has_died(state: RunState, silent: float) -> str | None:
    """How it is known that a running run's process is gone; None while it seems alive."""
    if state.host == node_name() and state.pid is not None and not Path(f"/proc/{state.pid}").exists():
        return f"process {state.pid} died without a word; the same command continues"
    if silent > SILENT_SECONDS:
        return f"no word from {state.host} for {silent:.0f} s: killed, or the node failed"
    return None


def _why_it_waits(job: Job, now: float) -> str:
    """A line such as ``waits for BeginTime (Slurm holds ...), not before 14:05:10``."""
    word = job.reason or job.state.replace("PENDING", "its turn")
    meaning = _WAITING.get(word.partition(",")[0])  # ReqNodeNotAvail names nodes behind a comma
    line = f"waits for {word}" + (f" ({meaning})" if meaning else "")
    if job.start is None:
        return line
    is_today = job.start.date() == datetime.fromtimestamp(now).date()
    moment = f"{job.start:%H:%M:%S}" if is_today else f"{job.start:%Y-%m-%d %H:%M}"
    return f"{line}, " + (f"not before {moment}" if word == "BeginTime" else f"expected to begin at {moment}")
