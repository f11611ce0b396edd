"""Runs cases.py once on two ranks and reports each of its cases."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from helpers.launching import launch

SCRIPT = Path(__file__).with_name("cases.py")


def names(decorator: str) -> list[str]:
    """Of the functions that carry the decorator, in all scripts of cases."""
    helpers = SCRIPT.parents[1] / "helpers"
    scripts = [SCRIPT, *sorted(helpers.glob("*_cases.py"))]
    functions = [n for path in scripts for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
    return [f.name for f in functions if any(getattr(d, "id", "") == decorator for d in f.decorator_list)]


NAMES, LONG_NAMES = names("case"), names("long_case")

pytestmark = pytest.mark.distributed


def run_cases(model_folder: Path, folder: Path, first: str, *which: str, timeout: float) -> dict[str, str]:
    path = folder / "results.json"
    process = launch(SCRIPT, *which, str(model_folder), str(path), timeout=timeout)
    merged: dict[str, str] = {}
    for part in sorted(folder.glob("results.json.*")):
        for name, result in json.loads(part.read_text()).items():
            if merged.get(name, "passed") == "passed":
                merged[name] = result
    return merged or {first: process.stdout[-3000:]}


@pytest.fixture(scope="module")
def results(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_cases(model_folder, tmp_path_factory.mktemp("cases"), NAMES[0], timeout=400)


@pytest.fixture(scope="module")
def long_results(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_cases(model_folder, tmp_path_factory.mktemp("long-cases"), LONG_NAMES[0], "long", timeout=1500)


def test_there_are_cases() -> None:
    assert len(NAMES) >= 8 and len(LONG_NAMES) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_case(name: str, results: dict[str, str]) -> None:
    result = results.get(name, "not reached: a case before it failed")
    assert result == "passed", result


@pytest.mark.long
@pytest.mark.parametrize("name", LONG_NAMES)
def test_long_case(name: str, long_results: dict[str, str]) -> None:
    assert long_results.get(name) == "passed", long_results.get(name, "not reached")
