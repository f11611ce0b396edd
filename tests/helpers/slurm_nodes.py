"""A node of the test cluster: let it fail as when its power goes, and let it come back."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from helpers.slurm_jobs import processes, slurm


def setting(name: str) -> str:
    """A setting of the cluster, as `scontrol show config` has it; empty where there is none."""
    lines = slurm("scontrol", "show", "config").splitlines()
    return next((line.partition("=")[2].strip() for line in lines if line.partition("=")[0].strip() == name), "")


class Node:
    """A node whose slurmd runs on this machine and belongs to the user who runs the tests.

    Skips the test where it does not: its pid is in the file that the cluster's SlurmdPidFile names.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        file = Path(setting("SlurmdPidFile").replace("%n", name).replace("%h", os.uname().nodename))
        try:
            self._daemon = psutil.Process(int(file.read_text()))
            self._command = self._daemon.cmdline()
            is_ours = self._daemon.name() == "slurmd" and self._daemon.uids().real == os.getuid()
        except (OSError, ValueError, psutil.Error):
            is_ours = False
        if not is_ours:
            pytest.skip(f"{name}'s slurmd is not a process of ours on this machine ({file})")
        if "-D" in self._command:
            pytest.skip(f"{name}'s slurmd runs in the foreground under a supervisor: {shlex.join(self._command)}")

    def fail(self) -> None:
        """SIGKILL for slurmd, for what watches the node's job steps, and for the steps' processes."""
        tasks = processes(SLURMD_NODENAME=self.name)
        above = {parent for task in tasks for parent in task.parents() if parent.name() == "slurmstepd"}
        for process in (self._daemon, *above, *tasks):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs([self._daemon, *above, *tasks], timeout=30)

    def kill_daemon(self) -> None:
        """SIGKILL for slurmd alone."""
        self._daemon.kill()
        psutil.wait_procs([self._daemon], timeout=30)

    def declare_down(self) -> None:
        """Tell Slurm, as an operator would; by itself it finds out after its SlurmdTimeout, five minutes by default."""
        slurm("scontrol", "update", f"NodeName={self.name}", "State=DOWN", "Reason=test")

    def restart(self) -> None:
        """Start slurmd as it was started before, and wait until jobs may use the node again."""
        subprocess.run(self._command, check=True, timeout=60)
        end = time.monotonic() + 60
        while slurm("sinfo", "--noheader", f"--nodes={self.name}", "--format=%t").startswith(("down", "unk")):
            assert time.monotonic() < end, slurm("sinfo", "--Node", "--long")
            # Needed unless the cluster has ReturnToService=2; refused once the node is back.
            subprocess.run(["scontrol", "update", f"NodeName={self.name}", "State=RESUME"], timeout=60, check=False)
            time.sleep(1)
