"""`sparse-llm-ft train` and `python -m sparse_llm_ft`: an installed package trains as launch/train.py does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers.launching import TRAIN
from sparse_llm_ft.config import merge

STARTS = {
    "script": [str(TRAIN)],
    "module": ["-m", "sparse_llm_ft"],
    "module under a launcher": ["-m", "sparse_llm_ft", "--local_rank=0"],
    "command": ["-m", "sparse_llm_ft", "train"],
}


@pytest.mark.parametrize("start", STARTS)
def test_every_start_refuses_in_the_same_words(settings: dict, tmp_path: Path, start: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, *STARTS[start], "--config", str(config), "adapter.r=0"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("error: adapter.r: 0 is not allowed"), result.stderr


@pytest.mark.distributed
def test_a_module_trains(settings: dict, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(merge(settings, {"evaluation": {"samples": 0}})))
    command = [sys.executable, "-m", "sparse_llm_ft", "--config", str(config), "training.max_steps=1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((Path(settings["output_dir"]) / "summary.json").read_text())["phases"][0]["steps"] == 1
