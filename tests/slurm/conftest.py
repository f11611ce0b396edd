"""A cluster of two nodes, if there is one here. Run pytest with --basetemp where the nodes share another folder."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.slurm_jobs import missing, slurm
from helpers.tiny_run import run_settings


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = missing() if here else None
    for item in here:
        item.add_marker(pytest.mark.slurm)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def no_job_is_left() -> Iterator[None]:
    yield
    subprocess.run(["scancel", "--me", "--full"], timeout=60, check=False)
    end = time.monotonic() + 60
    while slurm("squeue", "-h", "--me") and time.monotonic() < end:
        time.sleep(0.5)


@pytest.fixture(scope="session")
def slow_settings(model_folder: Path, data_folder: Path) -> dict:
    """WeightLoRA with dropout on ZeRO-2: 240 steps of about a quarter of a second on two slow cores."""
    settings = run_settings(model_folder, data_folder, Path("to be set"))
    settings["method"] = {"name": "weight_lora", "keep": 4, "steps": 20}
    settings["training"] |= {"max_steps": 240, "micro_batch_size": 1, "global_batch_size": 64, "save_every": 100}
    settings["deepspeed"] = {"zero_stage": 2}
    settings["evaluation"]["samples"] = 0
    return settings
