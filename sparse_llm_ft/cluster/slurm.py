"""What Slurm's commands say and do. Each call has a time limit; what goes wrong is one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sparse_llm_ft.errors import UserError, reason_of

SECONDS = 30.0
"""Within which a command must answer: a busy controller may take ten."""

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables of a shell that a launcher has started, or of a .bashrc: a job inherits its environment from `sbatch`, and
its tasks would take themselves for those ranks."""

_OF_A_STEP = ("SLURM_CPU_BIND", "SLURM_MEM_BIND", "SLURM_DISTRIBUTION", "SLURM_STEP")
"""How variables begin that `srun` gives to an interactive shell: a job would bind its tasks to that shell's cores."""


@dataclass(frozen=True)
class Job:
    """A job, or a task of an array.

    Attributes:
        state: Slurm's word, such as PENDING, RUNNING, TIMEOUT.
        reason: why it waits, such as Priority, Resources, BeginTime; empty where unknown.
        nodes: those it runs on, as Slurm writes them.
        start: when it began, or may begin if it waits: for most reasons Slurm's estimate. Local time; None where
            Slurm does not say.
    """

    state: str
    reason: str = ""
    nodes: str = ""
    start: datetime | None = None

    @property
    def waits(self) -> bool:
        """Whether it will run, at first or once more."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")

    @property
    def runs(self) -> bool:
        """Whether it has nodes."""
        return self.state in ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STAGE_OUT", "SIGNALING", "STOPPED")


def has_slurm() -> bool:
    """Whether jobs can be submitted here."""
    return shutil.which("sbatch") is not None


def submit(script: Path, options: Sequence[str] = ()) -> str:
    """Submit a batch script; returns the job's id.

    Raises:
        UserError: there is no Slurm here, or it refuses the script.
    """
    answer = _run(["sbatch", "--parsable", *options, str(script)])
    number = answer.strip().partition(";")[0]
    if not number.isdigit():
        raise UserError(f"sbatch: answered {answer.strip()!r:.100}; expected the number of a job")
    return number


def partitions() -> list[str]:
    """Names of the cluster's partitions, hidden ones too.

    Raises:
        UserError: Slurm does not answer.
    """
    return [line.strip().rstrip("*") for line in _run(["sinfo", "--all", "--noheader", "--format=%P"]).splitlines()]


def cancel(job: str) -> None:
    """Cancel a job: its processes get SIGTERM, and SIGKILL after the site's KillWait.

    Raises:
        UserError: Slurm refuses.
    """
    _run(["scancel", job])


def terminate_steps(job: str) -> None:
    """Send SIGTERM to what runs in a job, and leave the job itself.

    Raises:
        UserError: Slurm refuses.
    """
    _run(["scancel", "--signal=TERM", job])


def is_batch(job: str) -> bool:
    """Whether a job was submitted as a script, and is not somebody's interactive allocation.

    Raises:
        UserError: Slurm does not know the job.
    """
    return "BatchFlag=1" in _run(["scontrol", "show", "job", job, "--oneliner"])


def find_jobs(ids: Collection[str]) -> dict[str, Job]:
    """The jobs of these ids that Slurm still knows: the queue's, and of older ones what accounting says.

    Empty where there is no Slurm.

    Raises:
        UserError: Slurm does not answer.
    """
    if not ids or not has_slurm():
        return {}
    found = _queued(ids)
    return found | _accounted([job for job in ids if job not in found])


def _queued(ids: Collection[str]) -> dict[str, Job]:
    """Jobs that wait, run, or ended in the last minutes.

    Raises:
        UserError: Slurm does not answer.
    """
    columns = "JobArrayID:|,State:|,Reason:|,NodeList:|,StartTime:|"
    numbers = ",".join(sorted({job.partition("_")[0] for job in ids}))
    try:
        text = _run(["squeue", "--noheader", "--array", "--states=all", f"--jobs={numbers}", f"--Format={columns}"])
    except UserError as error:
        if "Invalid job id" in str(error):  # so it answers for a single job that is long gone
            return {}
        raise
    rows = [[field.strip() for field in line.split("|")] for line in text.splitlines()]
    return {
        row[0]: Job(row[1], "" if row[2] == "None" else row[2], row[3], _moment(row[4]))
        for row in rows
        if row[0] in ids
    }


def _moment(text: str) -> datetime | None:
    """A time of squeue's; None for its N/A."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def _accounted(ids: Sequence[str]) -> dict[str, Job]:
    if not ids or shutil.which("sacct") is None:
        return {}
    form = "--format=JobID,State,NodeList"
    try:
        text = _run(["sacct", "--noheader", "--allocations", "--parsable2", form, f"--jobs={','.join(ids)}"])
    except UserError:
        return {}  # a site without accounting
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 2]
    return {job: Job(state.split()[0], "", nodes) for job, state, nodes in rows if job in ids and state}


def _environment() -> dict[str, str]:
    """This process's, without what it has of a launcher or a step."""
    return {k: v for k, v in os.environ.items() if k not in _LAUNCHED and not k.startswith(_OF_A_STEP)}


def _run(command: Sequence[str]) -> str:
    """Standard output of a command that must succeed.

    Raises:
        UserError: it is not installed, fails, or does not answer.
    """
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            env=_environment() | {"SLURM_TIME_FORMAT": "standard"},
        )
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; expected a node of a Slurm cluster (a login node)") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: no answer within {SECONDS:.0f} s; the Slurm controller may be down") from None
    if result.returncode:
        said = re.sub(rf"^{command[0]}: (error: )?", "", result.stderr.strip(), flags=re.MULTILINE)
        raise UserError(f"{command[0]}: {reason_of(said) or f'exit status {result.returncode}'}")
    return result.stdout
