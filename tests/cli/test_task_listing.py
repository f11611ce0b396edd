"""`sparse-llm-ft tasks`: every task is listed and can be shown, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_llm_ft.cli.main import main
from sparse_llm_ft.cli.task_listing import list_tasks, show_task
from sparse_llm_ft.data.tasks import TASKS
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.io.console import ended_by_reader


def test_every_task_is_listed_with_its_data_set_and_metrics() -> None:
    lines = list_tasks().splitlines()[1:]
    assert [line.split()[0] for line in lines] == sorted(TASKS)
    for line in lines:
        task = TASKS[line.split()[0]]
        assert (task.hub_id or "-") in line and ", ".join(task.metrics) in line and line.endswith(task.description)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_be_shown(name: str) -> None:
    shown, task = show_task(name), TASKS[name]
    if name == "custom":
        assert "messages" in shown and "labels and texts" in shown
        return
    assert all(metric in shown for metric in task.metrics) and "example from an invented row" in shown
    assert all(f"{number} {word}" in shown for number, word in enumerate(task.labels or ()))
    (columns,) = (line for line in shown.splitlines() if line.startswith("columns:"))
    assert set(columns.removeprefix("columns:").replace(" ", "").split(",")) <= set(task.example or ())


def test_the_example_is_from_the_folder_that_is_given(tmp_path: Path) -> None:
    row = {"dialogue": "A: \x1b[2Jhi", "summary": "greets"}
    (tmp_path / "validation.json").write_text(json.dumps([row]))
    shown = show_task("dialogsum", str(tmp_path))
    assert f"example from {tmp_path}/validation.json, line 1" in shown
    assert "A: \\x1b[2Jhi" in shown and "\x1b" not in shown and "' greets'" in shown


def test_a_long_example_loses_its_middle(tmp_path: Path) -> None:
    row = {"dialogue": "begins " + "x" * 100_000 + " ends", "summary": "s"}
    (tmp_path / "train.json").write_text(json.dumps([row]))
    shown = show_task("dialogsum", str(tmp_path))
    assert len(shown) < 3000 and "begins xxx" in shown and " [...] " in shown and "xxx ends" in shown


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("sst2", None, "TASK: 'sst2' is unknown; did you mean glue/sst2?"),
        ("xsum", "nowhere", "--path: 'nowhere' is not a folder"),
        ("xsum", ".", r"task.path: '.' has no train.jsonl"),
        ("custom", ".", "task.prompt: not given, and task custom has none"),
    ],
)
def test_what_cannot_be_shown_is_said(tmp_path: Path, monkeypatch, name: str, path: str | None, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        show_task(name, path)


def test_the_command_ends_with_2_on_an_unknown_name(capsys) -> None:
    main(["tasks", "squad"])
    assert "squad:" in capsys.readouterr().out
    for arguments in (["tasks", "squat"], ["tasks", "--path", "."]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_tasks_are_listed_and_shown_without_torch() -> None:
    code = (
        "import sys; from sparse_llm_ft.cli.main import main; main(['tasks']); main(['tasks', 'dart']);"
        "slow = {'torch', 'transformers', 'peft', 'deepspeed', 'datasets', 'pyarrow'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("length", [1, 100_000])
def test_a_reader_that_leaves_ends_a_command_without_a_word(length: int) -> None:
    """As in ``sparse-llm-ft tasks dialogsum | head -1``, whether or not the output fits into Python's buffer."""
    code = (
        "from sparse_llm_ft.cli import main, task_listing\n"
        f"task_listing.show_task = lambda *_: 'x' * {length}\n"
        "main.main(['tasks', 'dialogsum'])\n"
    )
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    command.stdout.close()
    assert command.stderr.read() == b"" and command.wait() == 141


def test_another_broken_pipe_is_an_error_still() -> None:
    with pytest.raises(BrokenPipeError, match="a server's"), ended_by_reader():
        raise BrokenPipeError("a server's")
