"""Paths in a folder that another user keeps to himself: one line that names the setting."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparse_llm_ft.cli.main import main
from sparse_llm_ft.cluster.batch_script import JobOptions
from sparse_llm_ft.cluster.submission import Submission
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.context.preflight import preflight
from sparse_llm_ft.distributed.world import ONE_PROCESS
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.model.base_files import stage_folder
from sparse_llm_ft.run_folder import RunFolder


@pytest.fixture
def private(tmp_path: Path) -> Iterator[Path]:
    """A folder that the tests' user may not look into."""
    folder = tmp_path / "private"
    folder.mkdir()
    folder.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(0o700)


@pytest.mark.parametrize("key", ["model.name", "task.path"])
def test_a_setting_is_named(key: str, settings: dict, private: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: '{private}.* cannot be reached \(permission denied\); expected a"):
        section, _, name = key.partition(".")
        reachable = settings | {"task": settings["task"] | {"path": "/"}}
        parse_config(reachable | {section: reachable[section] | {name: f"{private}/x"}})


def _submit(config: Any) -> None:
    Submission(Path(config.output_dir), [config], JobOptions(1, 1, 1, "10:00"), is_sweep=False).check()


@pytest.mark.parametrize(
    "use", [lambda config: RunFolder(config.output_dir).check(config), lambda c: preflight(c, ONE_PROCESS), _submit]
)
def test_the_run_folder_is_named(use: Callable[[Any], object], settings: dict, private: Path) -> None:
    user = os.geteuid()
    os.seteuid(os.getuid())  # who may read the tests' data
    config = parse_config(settings | {"output_dir": f"{private}/x"})
    os.seteuid(user)
    with pytest.raises(ConfigError, match=r"^output_dir: .* cannot be reached \(permission denied\)"):
        use(config)


def test_the_folder_of_copies_is_named(private: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model.stage_to: .* cannot be reached \(permission denied\)"):
        stage_folder(f"{private}/x")


@pytest.mark.parametrize("command", ["status", "cancel", "export", "evaluate", "summary"])
def test_any_command_says_so_in_one_line(command: str, private: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, f"{private}/x"])
    printed = capsys.readouterr().err
    assert (end.value.code, printed.count("\n")) == (2, 1) and "permission denied" in printed.lower(), printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["export"],
        ["evaluate"],
        ["summary"],
        ["report"],
        ["status"],
        ["cancel"],
        ["tasks", "custom", "--path"],
        ["check-adapter"],
    ],
)
def test_a_path_that_is_too_long_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*arguments, "x" * 300])
    printed = capsys.readouterr().err
    assert (end.value.code, printed.count("\n")) == (2, 1), printed
