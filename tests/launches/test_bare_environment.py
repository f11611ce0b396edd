"""A run where nothing can be compiled: the interpreter by its path, no compiler, no ninja, the optimizer on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sparse_llm_ft.config import merge

pytestmark = pytest.mark.distributed
TRAIN = Path(__file__).parents[2] / "launch" / "train.py"


def test_a_run_compiles_nothing(settings: dict, tmp_path: Path) -> None:
    """A compilation that is killed leaves a lock, for which every later run of that user would wait without a word."""
    offload = {"zero_stage": 2, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    changes = {"deepspeed": offload, "training": {"max_steps": 1}, "evaluation": {"samples": 0}}
    config, extensions = tmp_path / "config.yaml", tmp_path / "extensions"
    config.write_text(yaml.safe_dump(merge(settings, changes)))
    environment = os.environ | {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(extensions)}
    result = subprocess.run(
        [sys.executable, str(TRAIN), "--config", str(config)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert not extensions.exists() or not list(extensions.rglob("*"))
