"""Submit jobs to a real Slurm and look at them. Every wait has a limit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from helpers.launching import ROOT

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


def cli(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`sparse-llm-ft`, as a user on a login node would call it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-m", "sparse_llm_ft", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=cwd, env=kept)


def state(run: Path) -> dict:
    """state.json; empty before it is there."""
    path = run / "state.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def logs(run: Path) -> str:
    """For assertion messages: what the run's jobs have printed."""
    return "\n".join(path.read_text(errors="replace")[-6000:] for path in sorted((run / "slurm").glob("*.log")))


def wait(run: Path, until: Callable[[], bool], seconds: float = 240) -> None:
    """Wait, with a limit. Slurm lets a requeued job wait for two minutes; here it may begin at once."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, f"{state(run)}\n{slurm('squeue')}\n{logs(run)}"
        for line in slurm("squeue", "-h", "-o", "%i %T %r").splitlines():
            job, word, reason = line.split(maxsplit=2)
            if word == "PENDING" and reason == "BeginTime":
                subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], timeout=60, check=False)
        time.sleep(0.5)


class Submitted:
    """A run and its job."""

    def __init__(self, run: Path, settings: dict, *options: str) -> None:
        run.parent.mkdir(parents=True, exist_ok=True)
        self.run, config = run, run.parent / f"{run.name}.yaml"
        config.write_text(yaml.safe_dump(settings | {"output_dir": str(run)}))
        self.answer = cli("submit", "--config", str(config), *options)
        assert self.answer.returncode == 0, self.answer.stdout + self.answer.stderr
        self.job = self.answer.stdout.partition("submitted ")[2].split()[1].rstrip(",")

    def in_queue(self) -> bool:
        return bool(slurm("squeue", "-h", "-o", "%i", "--me").split())

    def wait_end(self, seconds: float = 300) -> None:
        wait(self.run, lambda: not self.in_queue(), seconds)

    def wait_step(self, step: int) -> None:
        """Until an attempt trains and has done so many steps."""
        wait(self.run, lambda: (s := state(self.run)).get("pid") is not None and s["step"] >= step)
