"""A cluster of two nodes, if there is one here. Run pytest with --basetemp where the nodes share another folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.slurm_jobs import cancel_jobs, missing
from helpers.tiny_run import run_settings


@pytest.fixture(scope="session", autouse=True)
def cluster() -> None:
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture(autouse=True)
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
