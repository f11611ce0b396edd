"""Templates: which braces are fields, which are text, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparse_llm_ft.config import TaskConfig
from sparse_llm_ft.data.reading import check_columns, read_split
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.data.tasks import escaped_columns, render, template_columns
from sparse_llm_ft.errors import DataError

ROW = {
    "dialogue": "A: hi",
    "id": "7",
    "meta": {"speaker": "Ann", "first name": "A."},
    "turns": [{"text": "one"}, {"text": "two"}],
    "flat.name": "flat",
    "empty": None,
    "summary": "s",
}


def prompts(folder: Path, prompt: str, *rows: dict) -> list[str]:
    lines = "".join(json.dumps(row) + "\n" for row in rows or (ROW,))
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    task = resolve_task(TaskConfig(name="custom", path=str(folder), prompt=prompt, completion=" {summary}"))
    check_columns(task, "train")
    return [example.prompt for example in read_split(task, "train")]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("{dialogue}\nSummary:", "A: hi\nSummary:"),
        ("{ dialogue }|{id}", "A: hi|7"),
        ("{meta.speaker} {turns[1].text} {turns[-1].text} {meta['first name']}", "Ann two two A."),
        ("{flat.name}", "flat"),
        ("{empty.text}{id}", "7"),
        # Text, as before: JSON, code, LaTeX and a value that looks like a field.
        (
            '{"text": "{dialogue}", "answer": {"a": [{}], "b": "{id}"}}',
            '{"text": "A: hi", "answer": {"a": [{}], "b": "7"}}',
        ),
        ('{"input": {id}}', '{"input": 7}'),
        ("f() { return 0; } {id} } {", "f() { return 0; } 7 } {"),
        # Doubled braces.
        ("{{dialogue}} {id} {{{id}}}", "{dialogue} 7 {7}"),
        ('{{"text": {{"a": "{id}"}}, "b": {"c": {"d": 1}}}}', '{"text": {"a": "7"}, "b": {"c": {"d": 1}}}'),
        ("\\frac{{1}}{{2}} {id}", "\\frac{1}{2} 7"),
        ("{{ {id} and }} alone }}", "{ 7 and } alone }}"),
    ],
)
def test_fields_are_filled_and_other_braces_are_text(tmp_path: Path, prompt: str, expected: str) -> None:
    assert prompts(tmp_path, prompt) == [expected]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            "{id} { dialog }",
            r"train.jsonl:1: no column 'dialog'; found dialogue, id, meta\.speaker, .*summary; needed .*",
        ),
        ("{id} {dialog}", r"in a template \{\{dialog\}\} writes \{dialog\} as text"),
        ("{id} {meta.name}", r"no column 'meta.name': 'name' is not in column 'meta'; found .*meta\.speaker"),
        ("{id} {metadata.name}", r"no column 'metadata.name'; found dialogue"),
        ("{id} {turns.text}", r"no column 'turns.text': column 'turns' has list where 'text' is looked for"),
        ("{id} {dialogue.text}", r"no column 'dialogue.text': column 'dialogue' has str where 'text' is looked for"),
        ("{id} {turns[2].text}", r"train.jsonl:1: 'turns\[2\].text': column 'turns' has a list of 2 there"),
        ("{id} {meta}", r"column 'meta' is dict, not text"),
        ("{id} {dialogue!r}", r"\{dialogue!r\} in task.prompt: expected \{column\}"),
        ("{id} {dialogue:>10}", r"\{dialogue:>10\} in task.prompt: expected \{column\}"),
    ],
)
def test_a_field_that_is_no_column_is_named_with_the_columns(tmp_path: Path, prompt: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prompts(tmp_path, prompt)


def test_a_column_with_a_blank_is_refused_unless_its_braces_are_doubled(tmp_path: Path) -> None:
    row = {"first name": "Ann", "id": "7", "summary": "s"}
    with pytest.raises(DataError, match=r"\{first name\} in task.prompt"):
        prompts(tmp_path, "{id} {first name}", row)
    assert prompts(tmp_path, "{id} {{first name}}", row) == ["7 {first name}"]


def test_labels_texts_chats_and_references_may_lie_inside_of_a_column(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    row = {"data": {"label": "ham", "text": "t", "turns": turns, "other": ["o"]}}
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    place = {"name": "custom", "path": str(tmp_path)}
    settings = {"labels": ("ham", "spam"), "label_column": "data.label", "texts": ("data.text",)}
    (example,) = read_split(resolve_task(TaskConfig(**place, **settings)), "test")
    assert (example.label, example.texts) == (0, ("t",))
    chat = TaskConfig(**place, messages="data.turns", references=("data.other[0]", "data.none", "data.other[1]"))
    (example,) = read_split(resolve_task(chat), "test")
    assert example.references == ("ho", "o")


def test_names_in_doubled_braces_are_known_for_a_remark() -> None:
    assert escaped_columns('{{dialogue}} {id} {{{id}}} {{"a": 1}} {{ x.y }}') == ["dialogue", "x.y"]
    assert template_columns("{a} { b.c[0] } {{d}} {a}") == ["a", "b.c[0]"]
    assert render("{a} {b}", {"a": "{b}", "b": "x"}) == "{b} x"
