"""Tasks and local files: templates, references, and every complaint with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_llm_ft.config import TaskConfig
from sparse_llm_ft.data.reading import check_task, read_split
from sparse_llm_ft.data.tasks import TASKS, render
from sparse_llm_ft.errors import UserError


def task(folder: Path, **settings: object) -> TaskConfig:
    return TaskConfig(
        **{"name": "custom", "path": str(folder), "prompt": "{text} ?", "completion": " {answer}"} | settings
    )


def test_rows_become_prompt_completion_and_references(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(
        '\ufeff{"dialogue": "A: {hi}", "summary": "one", "summary2": "two", "summary3": "three"}\n\n', encoding="utf-8"
    )
    (example,) = read_split(TaskConfig(name="dialogsum", path=str(tmp_path)), "test")
    assert "A: {hi}" in example.prompt and example.completion == " one"
    assert example.references == ("one", "two", "three")


def test_a_template_replaces_whole_fields_only() -> None:
    assert render("{a} {b} {{a}}", {"a": "{b}", "b": "x"}) == "{b} x {{b}}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a", "answer": "b"', r"train.jsonl:2: not JSON \(.* at column \d+\)"),
        (b'["a"]', "train.jsonl:2: a JSON object is needed, not list"),
        (b'{"txt": "a", "answer": "b"}', "train.jsonl:2: no column 'text'; found txt, answer"),
        (b'{"text": 3, "answer": "b"}', "train.jsonl:2: column 'text' is int, text is needed"),
        (b'{"text": "\\ud800", "answer": "b"}', "train.jsonl:2: column 'text' holds half of a surrogate pair"),
        (b'{"text": "a", "answer": "  "}', "train.jsonl:2: the completion is empty"),
        (b'{"text": "\xff", "answer": "b"}', r"train.jsonl:2: not UTF-8 \(.* at byte 10\)"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "a", "answer": "b"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        read_split(task(tmp_path), "train")


def test_an_empty_and_a_missing_split_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"train.jsonl: no rows"):
        read_split(task(tmp_path), "train")
    with pytest.raises(UserError, match=r"has no test.jsonl; found: train.jsonl"):
        read_split(task(tmp_path), "test")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "dialogsun"}, "task.name: 'dialogsun' is unknown; did you mean dialogsum?"),
        ({"prompt": None}, "task.prompt: not given, and task custom has none"),
        ({"completion": "always"}, r"task.completion: 'always' has no \{column\} field"),
        ({"path": None}, "task.path: not given, and task custom has no data set on the hub"),
    ],
)
def test_a_task_that_cannot_work_is_refused(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_task(task(tmp_path, **settings))


def test_every_registered_task_is_complete() -> None:
    for name, entry in TASKS.items():
        assert entry.name == name
        assert (entry.hub_id is None) == (entry.prompt is None) == (entry.completion is None)
