"""A cluster of two nodes, if there is one here: README.md says which. The test of a hostfile needs none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.slurm_jobs import SUBMIT, Submitted, cancel_jobs, logs, missing, state
from helpers.tiny_run import run_settings


@pytest.fixture(scope="session")
def cluster() -> None:
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture
def no_job_is_left(cluster: None) -> Iterator[None]:
    yield
    cancel_jobs()


@pytest.fixture(scope="session")
def job_settings(model_folder: Path, data_folder: Path) -> dict:
    """WeightLoRA with dropout on ZeRO-2, 100 steps."""
    settings = run_settings(model_folder, data_folder, Path("to be set"))
    settings["method"] = {"name": "weight_lora", "keep": 4, "steps": 20}
    settings["training"] |= {"max_steps": 100, "save_every": 60}
    settings["deepspeed"] = {"zero_stage": 2}
    settings["evaluation"]["samples"] = 0
    return settings


@pytest.fixture(scope="session")
def reference(cluster: None, job_settings: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts: two nodes, one rank each, ZeRO-2, by `submit`."""
    job = Submitted(tmp_path_factory.mktemp("reference") / "run", job_settings, *SUBMIT, slow=None)
    job.wait_end()
    assert state(job.run)["state"] == "completed", logs(job.run)
    return job.run
