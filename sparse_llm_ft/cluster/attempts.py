"""How an attempt of a job begins and ends: the batch script asks whether to try again, and this counts in state.json.

A run that was asked to leave continues. A run whose process died is tried again, until an attempt does not get past the
step that the one before reached: then something is wrong with the run or the node, and the job stops for good. What
would end the same way again (a bad setting, a diverged loss, too little memory) is not tried again.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparse_llm_ft.cluster.job_folder import forbid_attempts, is_stopped, last_submission, why_stopped
from sparse_llm_ft.cluster.slurm import find_jobs
from sparse_llm_ft.cluster.state import (
    DETERMINISTIC,
    DEVICE_MEMORY_ADVICE,
    HOST_MEMORY_ADVICE,
    Reason,
    RunState,
    fitting,
    job_id,
    job_nodes,
    read_or_renew,
)
from sparse_llm_ft.distributed.exit_status import REQUEUE, TRAINING_ERROR, USER_ERROR
from sparse_llm_ft.distributed.world import node_name
from sparse_llm_ft.errors import DEVICE_MEMORY, HOST_MEMORY, NOTHING_NEW, UserError, one_line, shortened
from sparse_llm_ft.run_folder import RunFolder

MARK = "--- attempt "
"""Begins the line that separates the attempts in a job's log."""

_MOST_FAILURES = 2
_LOG_BYTES = 2**18
_DEAD_TASK = re.compile(r"^srun: error: (\S+): tasks? [-,\d]+: (Killed|Out Of Memory|Segmentation|Aborted|Bus|Exited)")
_LEFT = re.compile(r"^(?:\S+: ?)?SIG[A-Z0-9]+: .*; the same command continues$", re.MULTILINE)
"""What rank 0 says when it was asked to leave, perhaps behind a launcher's prefix."""
_HOST_MEMORY = re.compile(
    # slurmstepd's words for a kill by a cgroup and for one by JobAcctGatherParams=OverMemoryKill, srun's, torch's.
    rf"oom[_-]kill|exceeded (?:virtual )?memory limit|: Out Of Memory|{HOST_MEMORY.pattern}"
)


@dataclass(frozen=True)
class Verdict:
    """What the batch script does next: 75 tries again, anything else ends the job.

    Attributes:
        line: for the log.
    """

    status: int
    line: str


def begin(folder: RunFolder, environment: Mapping[str, str] = os.environ, submission: str = "") -> Verdict:
    """An attempt begins in this job: record it.

    An earlier attempt that still says "running", or whose failure `end` has not counted, died with its batch script (a
    node failed, and Slurm requeued the job): that counts as a failure, unless it had not taken its folder yet. Then it
    may as well have been asked to leave while it loaded.

    Args:
        submission: the mark in the batch script; empty: none.

    Returns:
        Status 0, or 2 where no attempt may follow.

    Raises:
        UserError: the state cannot be read.
        OSError: it cannot be written.
    """
    if submission and last_submission(folder) not in ("", submission):
        own = job_id(environment)
        return Verdict(USER_ERROR, f"{folder.path} was submitted again; job {own}, of an earlier `submit`, ends")
    state = read_or_renew(folder.path)
    if _runs_elsewhere(state, environment):
        return Verdict(USER_ERROR, f"{folder.path} is trained by job {state.job_id}; expected its end, or `cancel`")
    if folder.is_complete():
        return Verdict(0, f"{folder.path} is complete")
    is_open = state.pid is not None and state.counted < state.attempt and not is_stopped(folder)
    if is_open and state.state == "running":
        state = _count_failure(folder, state, "node_failure", "its node failed, or it was killed", state.nodes)
    elif is_open and state.reason is not None and state.reason not in DETERMINISTIC:
        state = _count_failure(folder, state, state.reason, state.message, state.nodes)
    if is_stopped(folder):
        return Verdict(USER_ERROR, why_stopped(folder))
    now = time.time()
    state = state.updated_by(
        state="running",
        reason=None,
        message="",
        started=state.started or now,
        attempt_started=now,
        updated=now,
        attempt=state.attempt + 1,
        host=node_name(environment),
        pid=None,
        job_id=job_id(environment),
        nodes=job_nodes(environment),
    )
    state.write(folder.path)
    return Verdict(0, f"{MARK}{state.attempt} of {folder.path}, job {state.job_id} on {state.nodes}")


def _runs_elsewhere(state: RunState, environment: Mapping[str, str]) -> bool:
    """Whether another job trains the run, as far as Slurm says it."""
    if state.state != "running" or state.job_id in (None, job_id(environment)):
        return False
    try:
        other = find_jobs([state.job_id]).get(state.job_id)
    except UserError:  # it does not answer; the run's own lock keeps two apart
        return False
    return other is not None and other.state in ("RUNNING", "SUSPENDED")  # one that is COMPLETING trains no more


def end(folder: RunFolder, status: int, log: Path | None = None) -> Verdict:
    """An attempt has ended with this exit status of its launcher: record why, and decide what follows.

    The run's own word counts for more than the status, which launchers replace by their own.

    Args:
        log: the job's log, in which srun names dead tasks and their nodes.

    Raises:
        UserError: the state cannot be read.
        OSError: it cannot be written.
    """
    state = read_or_renew(folder.path)
    if folder.is_complete():
        if state.state != "completed":
            state.ended("completed").write(folder.path)
        return Verdict(0, f"{folder.path} is complete")
    text = _last_attempt(log)
    # Asked to leave before it had begun to train; most launchers replace the status.
    if state.state == "running" and (status == REQUEUE or (state.pid is None and _has_left(text))):
        state = state.ended("preempted", NOTHING_NEW)
        state.write(folder.path)
    if state.state == "preempted":
        if is_stopped(folder):  # cancelled
            return Verdict(USER_ERROR, why_stopped(folder))
        if not state.message.endswith(NOTHING_NEW):  # it got on: failures before and after are not in a row
            state.updated_by(failures=0, failed_step=None, failed_nodes=[]).write(folder.path)
        return Verdict(REQUEUE, f"{state.message}; the run continues")
    if state.state == "running":  # without a word
        reason, message = _guess(status, text)
        state = state.failed(reason, message)
    elif state.reason in ("error", "node_failure") and (lack := _lack_of_memory(text)):  # of another rank
        state = state.failed("out_of_memory", lack)
    reason = state.reason or "error"
    if reason in DETERMINISTIC:
        state = state.updated_by(updated=time.time())
        state.write(folder.path)
        return _stop(folder, f"failed ({reason}): {state.message}")
    state = _count_failure(folder, state, reason, state.message, fitting(_dead_nodes(text)) or state.nodes)
    if is_stopped(folder):
        return Verdict(TRAINING_ERROR, state.message)
    return Verdict(REQUEUE, f"{state.message}; trying once more")


def _count_failure(folder: RunFolder, state: RunState, reason: Reason, message: str, where: str) -> RunState:
    """Count an attempt's failure at the state's step, and stop for good after two."""
    again = state.failed_step is not None and state.step <= state.failed_step
    failures = state.failures + 1 if again else 1
    nodes = [*state.failed_nodes, where] if again else [where]
    named = f"{reason} after step {state.step} on {where or state.host or 'an unknown node'}: {message}"
    if failures >= _MOST_FAILURES:
        where = " and ".join(dict.fromkeys(nodes))
        named = f"stopped: {failures} attempts in a row failed after step {state.step}, on {where}; {message}"
        _stop(folder, named)
    state = state.failed(reason, shortened(named, 1000)).updated_by(
        failed_step=state.step,
        failures=failures,
        failed_nodes=nodes[-100:],
        counted=state.attempt,
        updated=time.time(),
    )
    state.write(folder.path)
    return state


def _stop(folder: RunFolder, line: str) -> Verdict:
    line = one_line(line)
    forbid_attempts(folder, line)
    return Verdict(TRAINING_ERROR, line)


def _last_attempt(log: Path | None) -> str:
    """What the log says since the last attempt began, at most 256 KiB of it."""
    if log is None or not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    return text.rpartition(MARK)[2]


def _dead_tasks(text: str) -> list[re.Match[str]]:
    """What srun says about tasks that died, up to the line in which it begins to end the others."""
    before = text.partition("Terminating StepId")[0]
    return [match for line in before.splitlines() if (match := _DEAD_TASK.match(line))]


def _dead_nodes(text: str) -> str:
    """The nodes of the tasks that srun saw dying, in order."""
    return ",".join(dict.fromkeys(match[1] for match in _dead_tasks(text)))


def _has_left(text: str) -> bool:
    """Whether the run says that it was asked to leave, and not because a task was killed, which srun does too."""
    return _LEFT.search(text) is not None and all(match[2] == "Exited" for match in _dead_tasks(text))


def _guess(status: int, text: str) -> tuple[Reason, str]:
    """Why a run ended that did not say it, from status and log."""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    said = errors[-1].removeprefix("error: ") if errors else f"exit status {status}"
    if status == USER_ERROR and errors:  # without a word it is srun's, which could not start a program
        return "bad_setting", said
    if lack := _lack_of_memory(text):
        return "out_of_memory", lack
    if _dead_nodes(text):
        return "killed", f"a process died ({said})"
    return "error", said


def _lack_of_memory(text: str) -> str | None:
    """What the log says about memory that was lacking, with what would be right; None where it says nothing."""
    if DEVICE_MEMORY.search(text):
        return f"a GPU had too little memory; {DEVICE_MEMORY_ADVICE}"
    if _HOST_MEMORY.search(text):
        where = _dead_nodes(text)
        place = f" on {where}" if where else ""
        return f"a process{place} used more memory than the job or the node has; {HOST_MEMORY_ADVICE}"
    return None
