"""Runs cases.py once on two ranks and reports each of its cases: in forks, and the long ones under the launcher."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
from helpers.launching import launch

SCRIPT = Path(__file__).with_name("cases.py")


def names(decorator: str) -> list[str]:
    """Of the functions that carry the decorator, in all scripts of cases."""
    scripts = [SCRIPT, *sorted((SCRIPT.parent.parent / "helpers").glob("*_cases.py"))]
    functions = [n for path in scripts for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
    return [f.name for f in functions if any(getattr(d, "id", "") == decorator for d in f.decorator_list)]


NAMES, LONG_NAMES = names("case"), names("long_case")

pytestmark = pytest.mark.distributed


def read_results(folder: Path, first: str, output: str) -> dict[str, str]:
    """What the ranks have written; nothing stands for a first case that the output explains."""
    merged: dict[str, str] = {}
    for part in sorted(folder.glob("results.json.*")):
        for name, result in json.loads(part.read_text()).items():
            if merged.get(name, "passed") == "passed":
                merged[name] = result
    return merged or {first: output[-3000:]}


@pytest.fixture(scope="module")
def results(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("cases")
    script = {"script": str(SCRIPT), "arguments": [str(model_folder), str(folder / "results.json")]}
    run_worlds({"logs": {"trees": script, "world_size": 2, "timeout": 400}}, folder)
    return read_results(folder, NAMES[0], last_lines(folder / "logs"))


@pytest.fixture(scope="module")
def long_results(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("long-cases")
    process = launch(SCRIPT, "long", str(model_folder), str(folder / "results.json"), timeout=2400)
    return read_results(folder, LONG_NAMES[0], process.stdout)


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
