"""Runs that are killed at random end as the ones that were not; and the trials notice when they do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.fork_server import run_script
from helpers.sabotage import SABOTAGES

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).with_name("kill_trials.py")


def trials(report: Path, *arguments: str, timeout: float = 1200) -> tuple[int, str]:
    """Exit status and output."""
    return run_script(SCRIPT, ["--report", str(report), *arguments], report.parent / "logs", timeout)


def test_a_few_trials(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    status, output = trials(report, "--trials", "2", "--configurations", "1", "--seed", "4")
    assert status == 0, output
    numbers = json.loads(report.read_text())
    assert (numbers["trials"], numbers["mismatches"]) == (2, 0) and numbers["kills"] >= 2
    assert "2 trials on 2 ranks" in report.with_suffix(".md").read_text()


@pytest.mark.long
def test_fifty_trials(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    status, output = trials(report, "--trials", "50", timeout=3600)
    assert status == 0, output
    numbers = json.loads(report.read_text())
    assert numbers["kills"] >= 50 and len(numbers["kills_by_place"]) >= 12
    assert len(numbers["kills_by_method"]) >= 8 and len(numbers["kills_by_zero_stage"]) == 4


@pytest.mark.long
@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_a_resumed_run_that_is_spoilt_is_noticed(sabotage: str, tmp_path: Path) -> None:
    """Whether samples, moments, step counts or dropout are not what they were, or steps are logged twice."""
    report = tmp_path / "report.json"
    status, output = trials(report, "--trials", "1", "--seed", "1", "--sabotage", sabotage)
    assert status == 1, output
    differences = "\n".join(json.loads(report.read_text())["every_trial"][0]["differences"])
    expected = {"metrics": "metrics.jsonl: steps", "samples": "other samples were consumed"}
    assert expected.get(sabotage, "adapter_model.safetensors differs") in differences


def test_every_place_to_die_at_is_there(tmp_path: Path) -> None:
    """A place that has moved would let the trials that draw it fail, and only those."""
    script = tmp_path / "arm.py"
    script.write_text("from helpers.places import PLACES\nfor place in PLACES.values():\n    place.arm(lambda: None)\n")
    status, output = run_script(script, [], tmp_path)
    assert status == 0, output
