"""Runs without Slurm say their state too: under launch/torchrun.sh, as on two machines, and when they are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from helpers.launching import ROOT, free_port

pytestmark = [pytest.mark.distributed, pytest.mark.long]
SLOW = ROOT / "tests" / "slurm" / "slow"


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | {"PYTHONPATH": f"{ROOT}{os.pathsep}{SLOW}", "SLOW_STEP": "0.3", "PATH": path} | more


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparse_llm_ft", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(), cwd=ROOT)


def state(run: Path) -> dict:
    path = run / "state.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def wait(until: Callable[[], bool], what: Callable[[], object], seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, what()
        time.sleep(0.2)


def test_two_agents_meet_are_cancelled_and_continue_until_one_is_killed(settings: dict, tmp_path: Path) -> None:
    run, config = tmp_path / "run", tmp_path / "config.yaml"
    settings["training"]["max_steps"] = 1000
    settings["evaluation"]["samples"] = 0
    config.write_text(yaml.safe_dump(settings | {"output_dir": str(run)}))

    def start(log: Path) -> list[subprocess.Popen[bytes]]:
        port = str(free_port())
        asked = environment(HEAD="127.0.0.1", NODES="2", GPUS="1", RUN_ID="test", PORT=port)
        command = [str(ROOT / "launch" / "torchrun.sh"), "--config", str(config)]
        with log.open("ab") as file:
            return [
                subprocess.Popen(command, env=asked, stdout=file, stderr=file, cwd=ROOT, start_new_session=True)
                for _ in range(2)
            ]

    log = tmp_path / "log"
    agents = start(log)
    try:
        wait(lambda: state(run).get("step", 0) >= 2, log.read_text)
        assert "running" in cli("status", str(tmp_path)).stdout
        answer = cli("cancel", str(run))
        assert answer.returncode == 0 and "SIGTERM: saved step" in answer.stdout, answer.stderr + log.read_text()
        wait(lambda: all(agent.poll() is not None for agent in agents), log.read_text)
        cancelled = state(run)
        assert (cancelled["state"], cancelled["reason"], cancelled["processes"]) == ("failed", "cancelled", 2)
        # The same command continues; then rank 0 dies without a word.
        agents += start(log)
        wait(lambda: state(run)["state"] == "running" and state(run)["step"] > cancelled["step"], log.read_text)
        os.kill(state(run)["pid"], signal.SIGKILL)
        wait(lambda: "failed: killed" in cli("status", str(tmp_path)).stdout, log.read_text)
        assert state(run)["attempt"] == 2
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
