"""Submit jobs to a real Slurm and look at them. Every wait has a limit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import yaml

from helpers.launching import ROOT

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")
ADAPTER = Path("adapter") / "adapter_model.safetensors"
_jobs: list[str] = []
SUBMIT = ["--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "1", "--time", "10"]


def missing() -> str | None:
    """Why the tests cannot run here."""
    if shutil.which("sinfo") is None:
        return "no Slurm here (sinfo not found)"
    answer = subprocess.run(["sinfo", "-h", "-o", "%D %t"], capture_output=True, text=True, timeout=30)
    if answer.returncode:
        return f"Slurm does not answer: {answer.stderr.strip()}"
    lines = [line.split() for line in answer.stdout.splitlines()]
    nodes = sum(int(count) for count, state in lines if state.startswith(("idle", "alloc", "mix", "comp")))
    return None if nodes >= 2 else f"two nodes are needed, and {nodes} are up"


def slurm(*command: str) -> str:
    """What one of Slurm's commands prints."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def environment(**more: str) -> dict[str, str]:
    """This process's, in which runs obey the variables of tests/slurm/slow/sitecustomize.py."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "slurm" / "slow")])
    return kept | more


def cli(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`sparse-llm-ft`, as a user on a login node would call it, with these variables besides."""
    command = [sys.executable, "-m", "sparse_llm_ft", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT, env=environment(**more))


def state(run: Path) -> dict:
    """state.json; empty before it is there."""
    path = run / "state.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def losses(run: Path) -> list[str]:
    """Step, phase and loss of each line of metrics.jsonl."""
    return [line.split('"learning_rate"')[0] for line in (run / "metrics.jsonl").read_text().splitlines()]


def processes(*words: str, **variables: str) -> list[psutil.Process]:
    """Processes on this machine that have these words in their command and these environment variables.

    Other users' are left out where the system does not let us look.
    """
    found = []
    for process in psutil.process_iter():
        try:
            if set(words) <= set(process.cmdline()) and variables.items() <= process.environ().items():
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return found


def rank_processes(job: str, rank: int) -> list[psutil.Process]:
    """The Python processes of a job's rank on this machine."""
    variables = {"SLURM_JOB_ID": job, "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2"}
    return processes("sparse_llm_ft", "train", **variables)


def logs(run: Path) -> str:
    """For assertion messages: what the run's jobs have printed."""
    return "\n".join(path.read_text(errors="replace")[-6000:] for path in sorted((run / "slurm").glob("*.log")))


def queued(jobs: Sequence[str]) -> list[list[str]]:
    """[id, state, reason] of these jobs, as far as they wait or run. A job that is being requeued counts."""
    command = ["squeue", "--noheader", "--states=all", "--format=%i %T %r", f"--jobs={','.join(jobs)}"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # fails if all are gone
    return [row for line in answer.stdout.splitlines() if (row := line.split(maxsplit=2))[1] not in ENDED]


def wait(run: Path, until: Callable[[], bool], seconds: float = 600) -> None:
    """Wait, with a limit. Slurm lets a requeued job wait for two minutes; here it may begin sooner.

    Not at once: in the second in which it was requeued, slurmd takes it for the attempt that has just ended, and Slurm
    ends it for good ("Killing non-startable batch job: Job credential revoked").
    """
    end, hurried = time.monotonic() + seconds, dict[str, float]()
    while not until():
        assert time.monotonic() < end, f"{state(run)}\n{slurm('squeue')}\n{logs(run)}"
        for job, word, reason in queued(_jobs):
            if word == "PENDING" and reason == "BeginTime" and time.monotonic() > hurried.get(job, 0.0):
                subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now+3"], timeout=60, check=False)
                hurried[job] = time.monotonic() + 30
        time.sleep(0.5)


def cancel_jobs() -> None:
    """End the jobs that this process has submitted, and no others."""
    if _jobs and queued(_jobs):
        subprocess.run(["scancel", *_jobs], timeout=60, check=False)
        end = time.monotonic() + 60
        while queued(_jobs) and time.monotonic() < end:
            time.sleep(0.5)


class Submitted:
    """A run and its job.

    Args:
        slow: seconds that each step takes longer, so that the run can be interrupted; None: no longer.
        more: further environment variables of `submit`, which the job inherits.
    """

    def __init__(self, run: Path, settings: dict, *options: str, slow: float | None = 0.4, **more: str) -> None:
        run.parent.mkdir(parents=True, exist_ok=True)
        self.run, config = run, run.parent / f"{run.name}.yaml"
        config.write_text(yaml.safe_dump(settings | {"output_dir": str(run)}))
        more |= {} if slow is None else {"SLOW_STEP": str(slow)}
        self.answer = cli("submit", "--config", str(config), *options, **more)
        assert self.answer.returncode == 0, self.answer.stdout + self.answer.stderr
        _, self.job, *rest = self.answer.stdout.partition("submitted ")[2].splitlines()[0].split()
        self.jobs = [self.job, *" ".join(rest).partition("then ")[2].replace(",", "").split()]
        _jobs.extend(self.jobs)

    def nodes(self) -> list[str]:
        """The names of the nodes that the present attempt has, rank 0's first."""
        return slurm("scontrol", "show", "hostnames", state(self.run)["nodes"]).split()

    def in_queue(self) -> bool:
        return bool(queued(self.jobs))

    def wait_end(self, seconds: float = 600) -> None:
        wait(self.run, lambda: not self.in_queue(), seconds)

    def wait_step(self, step: int) -> None:
        """Until an attempt trains and has done so many steps."""
        wait(self.run, lambda: (s := state(self.run)).get("pid") is not None and s["step"] >= step)
