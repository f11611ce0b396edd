"""`RunState`: what a run folder says about its run in ``state.json``."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparse_llm_ft.errors import UserError, one_line, shortened
from sparse_llm_ft.io.atomic import write_file
from sparse_llm_ft.io.strict_json_yaml import ParseError, read_json
from sparse_llm_ft.run_folder import STATE_FILE

_LOGGER = logging.getLogger(__name__)

Status = Literal["pending", "running", "preempted", "completed", "failed"]
Reason = Literal["out_of_memory", "timeout", "node_failure", "bad_setting", "diverged", "cancelled", "killed", "error"]
"""Why a run failed. ``killed``: a process died without a word, and nobody knows more."""

DEVICE_MEMORY_ADVICE = (
    "expected a smaller training.micro_batch_size, a higher deepspeed.zero_stage or model.quantization: nf4; "
    "`sparse-llm-ft plan` says what fits"
)
HOST_MEMORY_ADVICE = (
    "expected more memory for the job (submit with --sbatch=--mem=0 for all of a node's) or fewer processes on a node; "
    "`sparse-llm-ft plan` says what a run needs"
)
"""What would be right where a GPU, or a node, had too little memory."""

DETERMINISTIC: tuple[Reason, ...] = ("bad_setting", "diverged", "out_of_memory", "cancelled")
"""Trying again would end the same way, or nobody wants it."""

Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**62)]
_MOST = 2000
Text = Annotated[str, Field(max_length=_MOST)]


class RunState(BaseModel):
    """A run's state. Times are seconds since 1970.

    Attributes:
        reason: why it failed; None in other states.
        message: the reason in one line.
        step, total_steps: optimizer steps done, and those of the phase's schedule; 0 while unknown.
        loss, tokens_per_second: of the last logged step; the loss of a skipped update is None.
        seconds_left: until the last step, at the pace since the phase began in this attempt.
        started, attempt_started: when the first attempt began, and the last one; None before it.
        updated: when the file was written; a running run does so at least every 20 s.
        gpu_hours: hours of all attempts times their processes (one per GPU).
        host, pid: of rank 0; the pid is None before it has taken the folder.
        job_id: Slurm's, ``12_3`` for task 3 of array 12; None without Slurm.
        nodes: those of the job, as Slurm writes them.
        attempt: how many times the run was started.
        failed_step, failures: the step that the last failed attempt reached, and how many attempts in a row did not
            get past it.
        failed_nodes: where these attempts failed.
        counted: the last attempt whose failure is counted among them.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    state: Status = "pending"
    reason: Reason | None = None
    message: Text = ""
    step: Count = 0
    total_steps: Count = 0
    phase: Text = ""
    loss: Number | None = None
    tokens_per_second: Number | None = None
    seconds_left: Number | None = None
    started: Number | None = None
    attempt_started: Number | None = None
    updated: Number = 0.0
    gpu_hours: Number = 0.0
    processes: Count = 0
    host: Text = ""
    pid: Count | None = None
    job_id: Annotated[str, Field(pattern=r"^[0-9]+(_[0-9]+)?$")] | None = None
    nodes: Text = ""
    attempt: Count = 0
    failed_step: Count | None = None
    failures: Count = 0
    failed_nodes: Annotated[list[Text], Field(max_length=1000)] = []
    counted: Count = 0

    def updated_by(self, **changes: Any) -> RunState:
        """The state with these changes, checked."""
        return RunState.model_validate(self.model_dump() | changes)

    def failed(self, reason: Reason, message: str) -> RunState:
        """The state of a run that has failed."""
        return self.updated_by(state="failed", reason=reason, message=fitting(message), seconds_left=None)

    def ended(self, state: Status, message: str = "") -> RunState:
        """The state of a run that has ended otherwise."""
        return self.updated_by(state=state, reason=None, message=fitting(message), seconds_left=None)

    def write(self, folder: Path) -> None:
        """Replace the folder's state.json atomically.

        Raises:
            OSError: it cannot be written.
        """
        write_file(folder / STATE_FILE, json.dumps(self.model_dump(), indent=2) + "\n")


class DamagedState(UserError):
    """A state.json that holds no state. The next attempt may write it anew."""


def fitting(text: str) -> str:
    """The text in one line that the state can hold: a message may name hundreds of dead ranks or nodes."""
    return shortened(one_line(text), _MOST - 10)


def read_state(folder: Path) -> RunState | None:
    """The state in a run's folder; None where there is none.

    Raises:
        DamagedState: the file holds something else.
        UserError: it cannot be read.
    """
    path = folder / STATE_FILE
    try:
        return RunState.model_validate(read_json(path))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        what = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        raise DamagedState(f"{path}: not a run's state ({what})") from None
    except ParseError as error:
        raise DamagedState(f"{path}: not readable ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: not readable ({error})") from None


def read_or_renew(folder: Path) -> RunState:
    """The state in a run's folder; a new one where there is none, or a damaged one, which a warning then names.

    Raises:
        UserError: the file cannot be read, which may pass.
    """
    try:
        return read_state(folder) or RunState()
    except DamagedState as error:
        _LOGGER.warning("%s; it is written anew", error)
        return RunState()


def job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """This process's Slurm job as `RunState.job_id`; None outside of one."""
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def job_nodes(environment: Mapping[str, str] = os.environ) -> str:
    """The nodes of this process's Slurm job as `RunState.nodes`; empty outside of one."""
    return fitting(environment.get("SLURM_JOB_NODELIST", ""))
