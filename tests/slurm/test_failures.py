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
    slurm,
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
        wait(job.run, lambda: state(job.run)["reason"] == "node_failure")  # before that, the collective's error
        failed = state(job.run)
        assert f"rank 1 ({node.name})" in failed["message"], failed
        node.declare_down()
        wait(job.run, lambda: "pending" in cli("status", str(tmp_path)).stdout)
        listing = cli("status", str(tmp_path)).stdout
        assert "waits for " in listing and f"rank 1 ({node.name})" in listing, listing
    finally:
        node.restart()
    wait(job.run, lambda: state(job.run)["attempt"] == 2)
    assert state(job.run)["failures"] == 1
    job.wait_step(failed["step"] + 10)
    node = Node(job.nodes()[0])
    node.fail()
    try:
        node.declare_down()
        wait(job.run, lambda: "pending" in cli("status", str(tmp_path)).stdout)
        assert state(job.run)["state"] == "running"  # nobody was left who could have said more
        listing = cli("status", str(tmp_path)).stdout
        assert f"its last attempt died on {state(job.run)['nodes']}: a node failed" in listing, listing
    finally:
        node.restart()
    job.wait_end()
    last = state(job.run)
    assert (last["state"], last["step"], last["attempt"]) == ("completed", 100, 3), logs(job.run)
    assert (job.run / ADAPTER).read_bytes() == (reference / ADAPTER).read_bytes()
    assert losses(job.run) == losses(reference)


def test_a_process_that_takes_too_much_memory_ends_the_job(job_settings: dict, tmp_path: Path) -> None:
    """Rank 1 takes 3 GiB in its fifth step; the job has 2 GiB on each node."""
    is_polled = "OverMemoryKill" in setting("JobAcctGatherParams")
    if "MEMORY" not in setting("SelectTypeParameters") or not (is_polled or setting("ConstrainRAMSpace") == "yes"):
        pytest.skip("the cluster limits no job's memory; tests/slurm/README.md says what does")
    options = [*SUBMIT, "--sbatch=--mem=2000", *(["--sbatch=--acctg-freq=task=1"] if is_polled else [])]
    job = Submitted(tmp_path / "run", job_settings, *options, EAT_MEMORY="1:5:3000")
    job.wait_end()
    last = state(job.run)
    assert (last["state"], last["reason"], last["attempt"]) == ("failed", "out_of_memory", 1), logs(job.run)
    listing = cli("status", str(tmp_path)).stdout
    assert "failed: out of memory" in listing and "--sbatch=--mem=0" in listing, listing


def test_ctrl_c_under_srun_leaves_no_run_that_seems_to_run(job_settings: dict, tmp_path: Path) -> None:
    """At two Ctrl-C within a second, srun kills its tasks before they can save. One SIGINT by scancel lets them."""
    run, config = tmp_path / "run", tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(job_settings | {"output_dir": str(run)}))
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "--time=10", "--kill-on-bad-exit=1", sys.executable]
    command += ["-m", "sparse_llm_ft", "train", "--config", str(config)]
    log = tmp_path / "log"

    def start() -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return subprocess.Popen(command, cwd=ROOT, env=environment(SLOW_STEP="0.4"), stdout=file, stderr=file)

    sruns = [start()]
    try:
        wait(run, lambda: state(run).get("step", 0) >= 3)
        for _ in range(2):
            sruns[0].send_signal(signal.SIGINT)
            time.sleep(0.3)
        sruns[0].wait(timeout=120)
        wait(run, lambda: "failed: cancelled" in cli("status", str(tmp_path)).stdout)  # once its job has ended

        sruns.append(start())
        wait(run, lambda: log.read_text().count("select 1/100") == 2)
        slurm("scancel", "--signal=INT", state(run)["job_id"])
        assert sruns[1].wait(timeout=120) == 130, log.read_text()
    finally:
        for srun in sruns:
            srun.kill()
    last = state(run)
    assert last["state"] == "preempted" and last["message"].startswith("SIGINT: saved step "), log.read_text()
    wait(run, lambda: "preempted" in cli("status", str(tmp_path)).stdout)
