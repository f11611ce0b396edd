"""Tasks and local files: templates, references, and every complaint with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparse_llm_ft.config import TaskConfig
from sparse_llm_ft.data.reading import check_task, read_split
from sparse_llm_ft.data.tasks import TASKS, render
from sparse_llm_ft.data.tasks.custom import TASK as CUSTOM
from sparse_llm_ft.errors import UserError


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


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
        ({"texts": ("text",)}, r"task.texts: \('text',\) is for classification; expected task.labels"),
        ({"metric": "matthews"}, "task.metric: 'matthews' is for classification; expected task.labels"),
        ({"labels": ("a", "a")}, r"task.labels: \['a', 'a'\] has an empty or a repeated word"),
        ({"labels": ("a", " ")}, "has an empty or a repeated word"),
        ({"labels": ("a", "b")}, r"task.completion: ' \{answer\}' is not the label alone; expected '\{label\}'"),
        ({"labels": ("a", "b"), "label_column": "text"}, "task.label_column: 'text' is in task.prompt or task.texts"),
        ({"labels": ("a", "b"), "prompt": None, "completion": None}, "task.texts: not given, nor is task.prompt"),
    ],
)
def test_a_task_that_cannot_work_is_refused(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_task(task(tmp_path, **settings))


def test_every_registered_task_is_complete() -> None:
    for name, entry in TASKS.items():
        assert entry.name == name
        assert (entry.hub_id is None) == (entry.prompt is None) == (entry.completion is None)
        assert (entry.labels is None) == (entry.metric is None) == (entry.texts == ())
        check_task(
            TaskConfig(name=name, **({"prompt": "{a}", "completion": "{b}", "path": "."} if entry is CUSTOM else {}))
        )


def test_glue_rows_become_label_words_and_texts(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "train.jsonl", [{"sentence1": "It rains .", "sentence2": "It is wet .", "label": 1, "idx": 0}]
    )
    (example,) = read_split(TaskConfig(name="rte", path=str(tmp_path)), "train")
    assert example.texts == ("It rains .", "It is wet .") and example.label == 1
    assert example.completion == " no" and example.references == ("no",)
    assert "First: It rains ." in example.prompt and example.prompt.endswith("Answer:")


def test_glue_is_read_from_the_hub_by_configuration_and_test_is_validation(monkeypatch) -> None:
    import datasets

    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        return [{"sentence": "fine", "label": -1}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"nyu-mll/glue/sst2\[validation\]:1: label -1 is not 0 to 1 \(the row has no"):
        read_split(TaskConfig(name="sst2"), "test")
    assert asked == [("nyu-mll/glue", "sst2", "validation")]


CLASSIFIED = {"prompt": "{text} ?", "completion": None, "labels": ("bad", "good"), "label_column": "mark"}


def test_a_label_is_its_number_or_its_word(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"text": "a", "mark": 1}, {"text": "b", "mark": "bad"}])
    examples = read_split(task(tmp_path, **CLASSIFIED), "train")
    assert [(e.label, e.completion, e.texts) for e in examples] == [(1, " good", ("a",)), (0, " bad", ("b",))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "mark": 2}, r"train.jsonl:1: label 2 is not 0 to 1 \(task.labels is bad, good\)"),
        ({"text": "a", "mark": -1}, r"label -1 is not 0 to 1 \(the row has no label, as in GLUE's test splits\)"),
        ({"text": "a", "mark": "ugly"}, "train.jsonl:1: label 'ugly' is not 0 to 1"),
        ({"text": "a", "mark": True}, "label True is not 0 to 1"),
        ({"text": "a", "mark": None}, "label None is not 0 to 1"),
        ({"text": "a"}, "train.jsonl:1: no column 'mark'; found text"),
        ({"text": 3, "mark": 0}, "train.jsonl:1: column 'text' is int, text is needed"),
        ({"txt": "a", "mark": 0}, "train.jsonl:1: no column 'text'; found txt, mark"),
    ],
)
def test_a_bad_label_is_named_by_file_and_line(tmp_path: Path, row: dict, message: str) -> None:
    write_rows(tmp_path / "train.jsonl", [row])
    with pytest.raises(UserError, match=message):
        read_split(task(tmp_path, **CLASSIFIED), "train")


def test_texts_are_the_prompts_columns_unless_given() -> None:
    columns = {"labels": ("a", "b"), "completion": None}
    assert check_task(task(Path(), **columns, prompt="{x} or {y}")).texts == ("x", "y")
    assert check_task(task(Path(), **columns, prompt="{x} {y} {z}")).texts == ()
    assert check_task(task(Path(), **columns, prompt=None, texts=("y",))).texts == ("y",)
    assert check_task(task(Path(), **columns, prompt=None, texts=("y",))).completion == " {label}"
