"""Runs cases.py once on two ranks and reports each of its cases."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from launching import launch

SCRIPT = Path(__file__).with_name("cases.py")
NAMES = [
    node.name
    for script in (SCRIPT, SCRIPT.with_name("method_cases.py"), SCRIPT.with_name("sharding_cases.py"))
    for node in ast.parse(script.read_text()).body
    if isinstance(node, ast.FunctionDef) and any(getattr(d, "id", "") == "case" for d in node.decorator_list)
]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("cases") / "results.json"
    process = launch(SCRIPT, str(model_folder), str(path), timeout=400)
    merged: dict[str, str] = {}
    for part in sorted(path.parent.glob("results.json.*")):
        for name, result in json.loads(part.read_text()).items():
            if merged.get(name, "passed") == "passed":
                merged[name] = result
    return merged or {NAMES[0]: process.stdout[-3000:]}


def test_there_are_cases() -> None:
    assert len(NAMES) >= 8


@pytest.mark.parametrize("name", NAMES)
def test_case(name: str, results: dict[str, str]) -> None:
    result = results.get(name, "not reached: a case before it failed")
    assert result == "passed", result
