"""Any file as training data: examples, or one line with file and line number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from inputs import TEXTS, VALUES, is_one_line, wounded
from sparse_llm_ft.config import TaskConfig
from sparse_llm_ft.data.reading import read_split
from sparse_llm_ft.errors import DataError, UserError

ROW = {"text": "anna buys", "answer": "cake", "label": 1, "unused": [1, {"a": None}]}
GENERATION = {"prompt": "{text} ?", "completion": "{answer}"}
CLASSIFICATION = {"labels": ["no", "yes"], "texts": ["text"]}
KINDS = st.sampled_from([GENERATION, CLASSIFICATION])


def survives(folder: Path, data: bytes, kind: dict) -> None:
    (folder / "train.jsonl").write_bytes(data)
    try:
        examples = read_split(TaskConfig(name="custom", path=str(folder), **kind), "train")
    except UserError as error:
        assert is_one_line(error)
        assert not isinstance(error, DataError) or f"{folder}/train.jsonl:" in str(error)
        return
    for found in examples:
        assert found.completion.strip() and found.line >= 1
        "".join((found.prompt, found.completion, *found.references, *found.texts)).encode("utf-8")


@given(st.lists(wounded(ROW) | VALUES, min_size=1, max_size=3), KINDS)
def test_rows(tmp_path: Path, rows: list[Any], kind: dict) -> None:
    survives(tmp_path, "".join(json.dumps(row) + "\n" for row in rows).encode(), kind)


@given(st.lists(TEXTS, max_size=3), KINDS)
def test_lines_of_any_text(tmp_path: Path, lines: list[str], kind: dict) -> None:
    survives(tmp_path, "\n".join(lines).encode("utf-8", "surrogatepass"), kind)


GOOD = json.dumps(ROW).encode()


@given(st.binary(max_size=60), KINDS)
@example(b"\xef\xbb\xbf" + GOOD, GENERATION)
@example(GOOD + b"\n\xef\xbb\xbf" + GOOD, GENERATION)
@example(GOOD.decode().encode("utf-16"), GENERATION)
@example(b"\0\0\0\0", GENERATION)
@example(GOOD.replace(b"anna", b"an\0na"), GENERATION)
@example(b"[" * 200_000, GENERATION)
@example(GOOD.replace(b"1,", b"9" * 5000 + b","), CLASSIFICATION)
@example(GOOD.replace(b'"label": 1', b'"label": 1e999'), CLASSIFICATION)
@example(GOOD.replace(b'"unused"', b'"text"'), GENERATION)
@example(b'{"' + b"x" * 100_000 + b'": 1}', GENERATION)
@example(b'{"a\\nb": 1, "\\ud800": 2}', GENERATION)
def test_files_of_any_bytes(tmp_path: Path, data: bytes, kind: dict) -> None:
    survives(tmp_path, data, kind)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"[1]", "a JSON object is needed, not list"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "not JSON (nested too deeply)"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON (Exceeds the limit"),
        (b'{"text": "a", "text": "b"}', "not JSON (the key 'text' stands twice)"),
        (b'{"text": "\\ud800", "answer": "b"}', "half of a surrogate pair"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    (tmp_path / "train.jsonl").write_bytes(GOOD + b"\n" + line + b"\n")
    with pytest.raises(DataError) as error:
        read_split(TaskConfig(name="custom", path=str(tmp_path), **GENERATION), "train")
    assert "train.jsonl:2: " in str(error.value) and said in str(error.value)


def test_a_column_that_is_not_used_may_hold_what_pandas_writes(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a", "answer": "b", "score": NaN}\n')
    assert len(read_split(TaskConfig(name="custom", path=str(tmp_path), **GENERATION), "train")) == 1
