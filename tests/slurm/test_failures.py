"""What dies under a job of a real Slurm: ranks, a node's daemon, whole nodes, processes that take too much memory."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from helpers.launching import ROOT
from helpers.slurm_jobs import (
    ADAPTER,
    SUBMIT,
    Submitted,
    cli,
    environment,
    logs,
    losses,
    rank_processes,
    state,
    wait,
)
from helpers.slurm_nodes import Node, setting

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("no_job_is_left")]


def test_a_rank_that_dies_twice_at_one_step_ends_the_job_and_names_its_node(job_settings: dict, tmp_path: Path) -> None:
    """SIGKILL of rank 1 while it trains, and again while the second attempt loads."""
    job = Submitted(tmp_path / "run", job_settings, *SUBMIT)
    job.wait_step(3)
    _, name = job.nodes()
    (victim,) = rank_processes(job.job, 1)
    victim.kill()
    wait(job.run, lambda: "trying once more" in logs(job.run))
    failed = state(job.run)
    assert (failed["state"], failed["failures"], failed["failed_nodes"]) == ("failed", 1, [name]), logs(job.run)
    wait(job.run, lambda: state(job.run)["attempt"] == 2 and bool(rank_processes(job.job, 1)))
    rank_processes(job.job, 1)[0].kill()
    job.wait_end()
    last = state(job.run)
    assert (last["state"], last["failures"], last["failed_nodes"]) == ("failed", 2, [name, name]), logs(job.run)
    stopped = f"stopped: 2 attempts in a row failed after step {failed['failed_step']}, on {name}"
    assert last["message"].startswith(stopped)
    refused = cli("attempt", "begin", str(job.run))
    assert refused.returncode == 2 and "stopped: 2 attempts" in refused.stdout


def test_a_daemon_that_dies_alone_does_not_disturb_the_run(reference: Path, job_settings: dict, tmp_path: Path) -> None:
    """slurmd starts jobs and tells of their ends; the processes of a job do not need it."""
    job = Submitted(tmp_path / "run", job_settings, *SUBMIT)
    job.wait_step(3)
    node = Node(job.nodes()[1])
    node.kill_daemon()
    try:
        job.wait_step(20)
        assert "running" in cli("status", str(tmp_path)).stdout
    finally:
        node.restart()
    job.wait_end()
    assert (state(job.run)["state"], state(job.run)["attempt"]) == ("completed", 1), logs(job.run)
    assert (job.run / ADAPTER).read_bytes() == (reference / ADAPTER).read_bytes()


def test_nodes_that_fail_one_after_the_other_change_no_bit(reference: Path, job_settings: dict, tmp_path: Path) -> None:
    """First rank 1's node, then the one on which the batch script and rank 0 run."""
    job = Submitted(tmp_path / "run", job_settings, *SUBMIT)
    job.wait_step(10)
    node = Node(job.nodes()[1])
    node.fail()
    try:
        wait(job.run, lambda: state(job.run)["failures"] == 1)
        failed = state(job.run)
        assert (failed["state"], failed["reason"], failed["failed_nodes"]) == ("failed", "node_failure", [node.name])
        assert f"rank 1 ({node.name})" in failed["message"], failed
        listing = cli("status", str(tmp_path)).stdout
        assert "pending" in listing and f"rank 1 ({node.name})" in listing, listing
    finally:
        node.restart()
    wait(job.run, lambda: state(job.run)["attempt"] == 2)
    job.wait_step(failed["step"] + 10)
    node = Node(job.nodes()[0])
    node.fail()
    try:
        assert state(job.run)["state"] == "running"  # nobody is left who could say more
    finally:
        node.restart()
    wait(job.run, lambda: "pending" in cli("status", str(tmp_path)).stdout)
    assert f"its last attempt died on {state(job.run)['nodes']}: a node failed" in cli("status", str(tmp_path)).stdout
    job.wait_end()
    last = state(job.run)
    assert (last["state"], last["step"], last["attempt"]) == ("completed", 100, 3), logs(job.run)
    assert (job.run / ADAPTER).read_bytes() == (reference / ADAPTER).read_bytes()
    assert losses(job.run) == losses(reference)


def test_a_process_that_takes_too_much_memory_ends_the_job(job_settings: dict, tmp_path: Path) -> None:
    """Rank 1 takes 3 GiB in its fifth step; the job has 2 GiB on each node."""
    limits = "OverMemoryKill" in setting("JobAcctGatherParams")
    if not limits and setting("ConstrainRAMSpace") != "yes":
        pytest.skip("the cluster limits no job's memory (JobAcctGatherParams=OverMemoryKill or ConstrainRAMSpace=yes)")
    options = [*SUBMIT, "--sbatch=--mem=2000", *(["--sbatch=--acctg-freq=task=1"] if limits else [])]
    job = Submitted(tmp_path / "run", job_settings, *options, EAT_MEMORY="1:5:3000")
    job.wait_end()
    last = state(job.run)
    assert (last["state"], last["reason"], last["attempt"]) == ("failed", "out_of_memory", 1), logs(job.run)
    listing = cli("status", str(tmp_path)).stdout
    assert "failed: out of memory" in listing and "--sbatch=--mem=0" in listing, listing


def test_ctrl_c_in_an_allocation_saves_the_step_and_says_so(
    reference: Path, job_settings: dict, tmp_path: Path
) -> None:
    """srun passes the second Ctrl-C within a second on to its tasks. The same command continues."""
    run, config = tmp_path / "run", tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(job_settings | {"output_dir": str(run)}))
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "--time=10", "--kill-on-bad-exit=1", sys.executable]
    command += ["-m", "sparse_llm_ft", "train", "--config", str(config)]
    log = tmp_path / "log"
    with log.open("wb") as file:
        srun = subprocess.Popen(command, cwd=ROOT, env=environment(SLOW_STEP="0.4"), stdout=file, stderr=file)
    try:
        wait(run, lambda: state(run).get("step", 0) >= 3)
        srun.send_signal(signal.SIGINT)
        time.sleep(0.3)
        srun.send_signal(signal.SIGINT)
        srun.wait(timeout=120)
    finally:
        srun.kill()
    last = state(run)
    assert last["state"] == "preempted" and last["message"].startswith("SIGINT: saved step "), log.read_text()
    listing = cli("status", str(tmp_path)).stdout
    assert "preempted" in listing and "running" not in listing, listing
    subprocess.run(command, cwd=ROOT, env=environment(), timeout=300, check=True)
    assert (state(run)["state"], state(run)["attempt"]) == ("completed", 2)
    assert (run / ADAPTER).read_bytes() == (reference / ADAPTER).read_bytes()
