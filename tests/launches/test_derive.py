"""`sparse-llm-ft derive` under the launcher: what two ranks derive is what a later run, or one rank, finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers.launching import ROOT, free_port
from helpers.tiny_run import run_settings
from sparse_llm_ft.cli.main import main as command_line

pytestmark = pytest.mark.distributed


@pytest.fixture
def config(model_folder: Path, data_folder: Path, tmp_path: Path) -> Path:
    tree = run_settings(model_folder, data_folder, tmp_path / "run")
    tree["method"] = {"name": "partial_lora", "floor_metric": "loss", "shots": 6, "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "config.yaml"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`derive` in this process makes it a world of one; later tests start worlds of their own."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(variable, "")  # so that it is put back
        monkeypatch.delenv(variable)


def test_two_ranks_derive_and_one_finds_it(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    binary = str(Path(sys.executable).parent / "deepspeed")
    start = [binary, "--num_gpus", "2", "--master_port", str(free_port()), "--module", "sparse_llm_ft.cli.main"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    result = subprocess.run(
        [*start, "derive", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=environment | {"PATH": path},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "rows kept" in result.stdout and "self_attn.q_proj" in result.stdout
    assert not (config.parent / "run").exists()
    (entry,) = (folder for folder in (config.parent / "cache").iterdir() if folder.is_dir())
    ratios = json.loads((entry / "derivation.json").read_text())["ratios"]
    assert len(ratios) == 14 and all(0 <= share <= 1 for pair in ratios.values() for share in pair)
    capsys.readouterr()
    command_line(["derive", "--config", str(config)])
    assert f"ratios of 14 modules are in {config.parent / 'cache'}" in capsys.readouterr().out


def test_a_method_that_derives_nothing_is_said(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        command_line(["derive", "--config", str(config), "method.name=lora"])
    assert error.value.code == 2
    assert "method.name: lora derives nothing before it trains" in capsys.readouterr().err
