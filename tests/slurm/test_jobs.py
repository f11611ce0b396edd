"""Jobs of a real Slurm: they are submitted, interrupted and cancelled as users and clusters do it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from helpers.slurm_jobs import ADAPTER, SUBMIT, Submitted, cli, logs, losses, slurm, state, wait

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("no_job_is_left")]


def test_a_run_by_submit_says_what_it_does(reference: Path) -> None:
    last = state(reference)
    assert (last["state"], last["step"], last["processes"], last["attempt"]) == ("completed", 100, 2, 1)
    assert last["gpu_hours"] > 0
    listing = cli("status", str(reference.parent)).stdout
    assert "completed" in listing and "100/100" in listing


def test_the_limit_and_a_requeue_change_no_bit(reference: Path, job_settings: dict, tmp_path: Path) -> None:
    """USR2 before a real time limit of two minutes, then `scontrol requeue` in the middle of what is left."""
    options = [*SUBMIT[:-1], "2", "--leave-before", "50"]
    job = Submitted(tmp_path / "run", job_settings, *options, slow=1.0)  # not done before the signal comes
    wait(job.run, lambda: "SIGUSR2: saved step" in logs(job.run))
    before, attempts = state(job.run)["step"], state(job.run)["attempt"]
    assert 0 < before < 100
    # What is left needs no further limits on a slow machine; only operators may raise one.
    subprocess.run(["scontrol", "update", f"JobId={job.job}", "TimeLimit=60"], timeout=60, check=False)
    wait(job.run, lambda: state(job.run)["attempt"] == attempts + 1)
    job.wait_step(before + 5)
    slurm("scontrol", "requeue", job.job)
    wait(job.run, lambda: "SIGTERM: " in logs(job.run))
    job.wait_end()
    last = state(job.run)
    assert (last["state"], last["step"], last["failures"]) == ("completed", 100, 0), logs(job.run)
    assert last["attempt"] >= attempts + 2
    assert (job.run / ADAPTER).read_bytes() == (reference / ADAPTER).read_bytes()
    assert losses(job.run) == losses(reference)


def test_cancel_saves_the_step_and_says_so(job_settings: dict, tmp_path: Path) -> None:
    job = Submitted(tmp_path / "run", job_settings, *SUBMIT)
    job.wait_step(3)
    listing = cli("status", str(tmp_path)).stdout
    assert "running" in listing and "/100" in listing
    answer = cli("cancel", str(job.run))
    assert answer.returncode == 0 and "SIGTERM: saved step" in answer.stdout, answer.stdout + answer.stderr
    assert (state(job.run)["state"], state(job.run)["reason"]) == ("failed", "cancelled")
    assert not job.in_queue()
    step = int(answer.stdout.partition("saved step ")[2].rstrip(")\n"))
    assert (job.run / "checkpoints" / f"step-{step:08d}").is_dir()


def test_a_sweep_is_one_array_with_one_report(job_settings: dict, tmp_path: Path) -> None:
    settings = job_settings | {"method": {"name": "lora"}}
    settings["training"] = job_settings["training"] | {"max_steps": 4}
    options = ["--gpus-per-node", "0", "--tasks-per-node", "1", "--time", "10", "--sweep", "adapter.r=2,4"]
    job = Submitted(tmp_path / "sweep", settings, *options, slow=None)
    job.wait_end()
    runs = [tmp_path / "sweep" / "r-2", tmp_path / "sweep" / "r-4"]
    assert [state(run)["job_id"] for run in runs] == [f"{job.job}_0", f"{job.job}_1"]
    assert [state(run)["state"] for run in runs] == ["completed"] * 2, logs(tmp_path / "sweep")
    compare = job.answer.stdout.partition("compare: sparse-llm-ft ")[2].split()
    assert cli(*compare).returncode == 0
    assert (tmp_path / "sweep" / "report" / "index.html").is_file()


def test_a_chain_continues_where_no_job_may_be_requeued(job_settings: dict, tmp_path: Path) -> None:
    """Two jobs: the first is asked to leave, the second one completes the run."""
    settings = job_settings | {"training": job_settings["training"] | {"max_steps": 30}}
    job = Submitted(tmp_path / "run", settings, *SUBMIT, "--chain", "2")
    job.wait_step(3)
    slurm("scancel", "--signal=USR2", job.job)
    job.wait_end()
    last = state(job.run)
    assert (last["state"], last["attempt"]) == ("completed", 2), logs(job.run)
    assert last["job_id"] == str(int(job.job) + 1)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_other_launchers_pass_the_signal_on(launcher: str, job_settings: dict, tmp_path: Path) -> None:
    """They exit with a status of their own, and the job continues all the same."""
    settings = job_settings | {"training": job_settings["training"] | {"max_steps": 30}}
    job = Submitted(tmp_path / "run", settings, *SUBMIT, "--launcher", launcher)
    job.wait_step(3)
    slurm("scancel", "--signal=USR2", job.job)
    job.wait_end()
    last = state(job.run)
    assert (last["state"], last["attempt"], last["processes"]) == ("completed", 2, 2), logs(job.run)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--partition", "gpus"], "error: --partition gpus: unknown; expected one of "),
        (["--account", "nobody", "--sbatch=--constraint=h100"], "error: sbatch: "),
        (["--time", "soon"], "error: --time soon: expected HH:MM:SS"),
        (["--sweep", "method.kept=1,2"], "error: method.kept: unknown key; did you mean keep?"),
    ],
)
def test_what_cannot_be_submitted_is_one_line(
    options: list[str], line: str, job_settings: dict, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(job_settings | {"output_dir": str(tmp_path / "run")}))
    answer = cli("submit", "--config", str(config), *SUBMIT, *options)
    said = [row for row in answer.stderr.splitlines() if not row.startswith("importing ")]  # shown where it takes long
    assert answer.returncode == 2 and len(said) == 1, answer.stderr
    assert said[0].startswith(line)
    assert not state(tmp_path / "run")
