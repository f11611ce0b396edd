"""`sparse-llm-ft derive`: what two ranks derive is what a later run, or one rank, finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
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
    logs = config.parent / "logs"
    command = {"command": ["derive", "--config", str(config)]}
    statuses = run_worlds({"derive": {"trees": command, "world_size": 2}}, logs)
    output = last_lines(logs / "derive")
    assert statuses["derive"] == [0, 0], output
    assert "rows kept" in output and "self_attn.q_proj" in output
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
