"""SIGKILL anywhere, the same command again: the adapter of the run that was never interrupted, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from helpers.launching import ROOT, TRAIN, command, last_lines, launch
from sparse_llm_ft.checkpoint.store import newest_first

pytestmark = pytest.mark.distributed
KILLED = Path(__file__).with_name("killed_train.py")
ADAPTER = Path("adapter") / "adapter_model.safetensors"


def write_config(settings: dict, folder: Path) -> Path:
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings | {"output_dir": str(folder / "run")}))
    return config


def die_at(config: Path, place: str) -> None:
    result = launch(KILLED, "--config", str(config), environment={"KILL_AT": place, "TRAIN": str(TRAIN)})
    assert result.returncode not in (0, 1, 2), last_lines(result)  # killed, not failed
    assert not (config.parent / "run" / "summary.json").exists()


def finish(config: Path) -> str:
    result = launch(TRAIN, "--config", str(config))
    assert result.returncode == 0, last_lines(result)
    return result.stdout


def same_as(finished: Path, config: Path) -> None:
    resumed = config.parent / "run"
    assert (resumed / ADAPTER).read_bytes() == (finished / ADAPTER).read_bytes()
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] for run in (finished, resumed)]
    assert losses[0] == losses[1]


@pytest.mark.long
def test_killed_in_the_phase_change_and_then_in_a_save(finished_run: Path, plus_settings: dict, tmp_path: Path) -> None:
    """First between the engines of two phases, then, resumed, within the writing of the checkpoint of step 8."""
    config = write_config(plus_settings, tmp_path)
    die_at(config, "change:1")
    assert next(newest_first(tmp_path / "run" / "checkpoints")).name == "step-00000006"
    die_at(config, "torn:step-00000008")
    assert (tmp_path / "run" / "checkpoints" / ".tmp-step-00000008").is_dir()
    output = finish(config)
    assert "resuming from step 6" in output
    same_as(finished_run, config)
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))


@pytest.mark.long
def test_a_full_disk_stops_all_ranks_with_one_line(plus_settings: dict, tmp_path: Path) -> None:
    """In the first checkpoint, at its first file."""
    config = write_config(plus_settings, tmp_path)
    environment = {"KILL_AT": "full:step-", "TRAIN": str(TRAIN)}
    result = launch(KILLED, "--config", str(config), environment=environment, timeout=200)
    assert result.returncode == 2, last_lines(result)
    assert result.stdout.count("error: ") == 1 and "No space left on device" in result.stdout, last_lines(result)
    assert not list(newest_first(tmp_path / "run" / "checkpoints"))


@pytest.mark.long
@pytest.mark.parametrize("place", ["save:1", "step:1", "step:5", "step:7", "step:13", "change:1", "finish:1"])
def test_killed_anywhere(place: str, finished_run: Path, plus_settings: dict, tmp_path: Path) -> None:
    config = write_config(plus_settings, tmp_path)
    die_at(config, place)
    finish(config)
    same_as(finished_run, config)


@pytest.mark.long
@pytest.mark.parametrize("seconds", [9, 13, 16, 19, 22])
def test_killed_from_outside_after_some_seconds(
    seconds: float, finished_run: Path, plus_settings: dict, tmp_path: Path
) -> None:
    """All processes at once, wherever they are."""
    config = write_config(plus_settings, tmp_path)
    process = subprocess.Popen(
        command(TRAIN, ["--config", str(config)], ranks=2),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finish(config)
    same_as(finished_run, config)


@pytest.mark.long
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(
    finished_run: Path, plus_settings: dict, tmp_path: Path
) -> None:
    config = write_config(plus_settings, tmp_path)
    die_at(config, "step:10")
    damaged = tmp_path / "run" / "checkpoints" / "step-00000008" / "tensors.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    output = finish(config)
    assert "step-00000008: tensors.safetensors has" in output and "using the checkpoint before it" in output
    assert "resuming from step 6" in output
    same_as(finished_run, config)
