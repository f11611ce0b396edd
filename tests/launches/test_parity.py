"""The parity matrix: a slice of it, and all of it under `make test-distributed`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.fork_server import run_script
from launches.parity import METHODS, TOLERANCE, VARIANTS, WHOLE_MATRICES, Case, Outcome, matrix

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).with_name("parity.py")


def run_matrix(report: Path, *arguments: str, timeout: float) -> list[dict]:
    status, output = run_script(SCRIPT, ["--report", str(report), *arguments], report.parent / "logs", timeout)
    assert status == 0, output[-4000:]
    return json.loads(report.read_text())


def test_the_matrix_has_every_method_stage_dtype_world_and_offload() -> None:
    cases = set(matrix())
    for method in (*METHODS, *VARIANTS):
        for dtype in TOLERANCE:
            combinations = {(c.stage, c.world, c.offload) for c in cases if (c.method, c.dtype) == (method, dtype)}
            expected = 0 if (method, dtype) == ("full", "nf4") else 9 if method in WHOLE_MATRICES else 13
            assert len(combinations) == expected, (method, dtype)


def test_a_run_that_differs_is_not_passed() -> None:
    case = Case("lora", "float32", 2, 2)
    assert Outcome(case, [0, 0], loss=1e-5).passed
    assert not Outcome(case, [0, 0], loss=1e-3).passed and not Outcome(case, [1, 0], problem="x").passed


def test_a_slice(tmp_path: Path) -> None:
    """Methods that change phases, with masks in the optimizer and shared adapters; a few cells of each."""
    methods = ["partial", "drop_then_partial"]
    rows = run_matrix(
        tmp_path / "parity.json", "--methods", *methods, "--dtypes", "float32", "--every", "6", timeout=400
    )
    assert len(rows) == 5 and {row["case"]["method"] for row in rows} == set(methods)


@pytest.mark.long
def test_the_whole(tmp_path: Path) -> None:
    assert len(run_matrix(tmp_path / "parity.json", timeout=3 * 3600)) == len(set(matrix()))
