"""Runs that go on with other ranks and stages arrive where the uninterrupted one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).with_name("elastic.py")
ONE = ("--methods", "weight_lora, keep_global", "--dtypes", "float32")


def travel(report: Path, *arguments: str, timeout: float = 1200) -> tuple[int, list[dict]]:
    """Exit status and results."""
    command = [sys.executable, str(SCRIPT), "--report", str(report), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert report.is_file(), process.stderr[-4000:]
    return process.returncode, json.loads(report.read_text())


@pytest.mark.long
def test_other_ranks_and_other_stages_at_once(tmp_path: Path) -> None:
    status, results = travel(tmp_path / "report.json", *ONE, "--journeys", "ranks 2, 1, 4 and stages 2, 3, 1")
    assert status == 0 and len(results) == 1, results
    assert 0 < results[0]["loss_difference"] < 1e-5 and results[0]["adapter_difference"] < 1e-5


@pytest.mark.long
def test_every_journey(tmp_path: Path) -> None:
    status, results = travel(tmp_path / "report.json", timeout=3600)
    assert status == 0 and len(results) == 24, [result for result in results if result["differences"]]


@pytest.mark.long
@pytest.mark.parametrize(("sabotage", "said"), [("samples", "other samples"), ("moments", "losses differ")])
def test_a_leg_that_is_spoilt_is_noticed(sabotage: str, said: str, tmp_path: Path) -> None:
    status, results = travel(tmp_path / "report.json", *ONE, "--journeys", "ranks 2, 1, 4", "--sabotage", sabotage)
    assert status == 1 and said in str(results[0]["differences"]), results
