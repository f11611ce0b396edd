"""Start real processes under a launcher, as a user would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TRAIN = ROOT / "launch" / "train.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(script: Path, arguments: Sequence[str], ranks: int, launcher: str = "deepspeed") -> list[str]:
    """The command line that runs `script` on `ranks` processes of this machine."""
    binaries = Path(sys.executable).parent
    if launcher == "deepspeed":
        start = [str(binaries / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port())]
    elif launcher == "torchrun":
        start = [str(binaries / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    else:
        start = [sys.executable]
    return [*start, str(script), *arguments]


def launch(
    script: Path,
    *arguments: str,
    ranks: int = 2,
    launcher: str = "deepspeed",
    environment: dict[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run to the end; on a timeout everything that was started is killed and the output so far is raised."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    inherited["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}"
    process = subprocess.Popen(
        command(script, arguments, ranks, launcher),
        cwd=ROOT,
        env=inherited | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout} s:\n{output[-4000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def last_lines(result: subprocess.CompletedProcess[str]) -> str:
    """For assertion messages."""
    return f"exit status {result.returncode}\n{result.stdout[-6000:]}"
