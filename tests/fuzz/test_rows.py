"""Any file of any format as training data: examples, or one line with file and line number."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.inputs import TEXTS, VALUES, is_one_line, wounded
from sparse_llm_ft.config import TaskConfig
from sparse_llm_ft.data.files import ENDINGS
from sparse_llm_ft.data.reading import Skipped, read_split
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.errors import DataError, UserError

ROW = {
    "text": "anna buys",
    "answer": "cake",
    "label": 1,
    "unused": [1, {"a": None}],
    "question": "who",
    "context": "anna buys",
    "answers": {"text": ["anna"], "answer_start": [0]},
    "tripleset": [["anna", "buys", "cake"]],
    "annotations": {"source": ["x"], "text": ["anna buys cake"]},
    "turns": [{"role": "user", "content": "who"}, {"role": "assistant", "content": "anna"}],
}
GENERATION = {"name": "custom", "prompt": "{text} ?", "completion": "{answer}"}
CLASSIFICATION = {"name": "custom", "labels": ["no", "yes"], "texts": ["text"]}
REGRESSION = {"name": "custom", "score": [0, 5], "texts": ["text"]}
CHAT = {"name": "custom", "messages": "turns", "references": ["answer"]}
SPAN, TRIPLES = {"name": "squad_v2"}, {"name": "dart"}
KINDS = st.sampled_from([GENERATION, CLASSIFICATION, REGRESSION, CHAT, SPAN, TRIPLES])


def survives(folder: Path, data: bytes, kind: dict, ending: str = ".jsonl") -> None:
    """Read as an error and as a count of rows left out, in training and in an evaluated split."""
    for old in folder.glob("*.*"):
        old.unlink()
    path = folder / f"validation{ending}"
    path.write_bytes(data)
    for on_bad_row in ("error", "skip"):
        config, skipped = TaskConfig(path=str(folder), on_bad_row=on_bad_row, **kind), Skipped()
        try:
            examples = read_split(resolve_task(config), "validation", skipped=skipped)
        except UserError as error:
            assert is_one_line(error)
            assert not isinstance(error, DataError) or f"{path}:" in str(error)
            continue
        assert examples and (on_bad_row == "skip" or not skipped.count)
        for found in examples:
            assert found.completion.strip() and found.line >= 1
            "".join((found.prompt, found.completion, *found.references, *found.texts)).encode("utf-8")
            for text, start in found.answers or ():
                assert found.texts[1][start : start + len(text)] == text


@given(st.lists(wounded(ROW) | VALUES, min_size=1, max_size=3), KINDS)
def test_rows(tmp_path: Path, rows: list[Any], kind: dict) -> None:
    survives(tmp_path, "".join(json.dumps(row) + "\n" for row in rows).encode(), kind)


@given(st.lists(TEXTS, max_size=3), KINDS)
def test_lines_of_any_text(tmp_path: Path, lines: list[str], kind: dict) -> None:
    survives(tmp_path, "\n".join(lines).encode("utf-8", "surrogatepass"), kind)


@given(st.lists(wounded(ROW) | VALUES, min_size=1, max_size=3) | wounded([ROW, ROW]) | wounded({"data": [ROW]}), KINDS)
def test_json_documents(tmp_path: Path, document: Any, kind: dict) -> None:
    survives(tmp_path, json.dumps(document).encode(), kind, ".json")


@given(st.lists(st.lists(TEXTS, max_size=4), max_size=3), st.sampled_from([".csv", ".tsv"]), KINDS)
def test_tables(tmp_path: Path, rows: list[list[str]], ending: str, kind: dict) -> None:
    file = io.StringIO()
    writer = csv.writer(file, delimiter="\t" if ending == ".tsv" else ",")
    writer.writerows([["text", "answer", "label"], ["anna", "cake", "1"], *rows])
    survives(tmp_path, file.getvalue().encode("utf-8", "surrogatepass"), kind, ending)


def columnar(rows: list[dict], ending: str) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    if ending == ".parquet":
        pyarrow.parquet.write_table(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


FLAT = {key: value for key, value in ROW.items() if key != "unused"}


@given(
    st.sampled_from(sorted(FLAT)),
    st.none() | st.integers(-3, 7) | st.text(max_size=9),
    st.sampled_from([".parquet", ".arrow"]),
    KINDS,
)
def test_columnar_files_of_other_types(tmp_path: Path, column: str, value: Any, ending: str, kind: dict) -> None:
    survives(tmp_path, columnar([{**FLAT, column: value}], ending), kind, ending)


@given(st.data(), st.sampled_from([".parquet", ".arrow"]))
def test_damaged_columnar_files(tmp_path: Path, data: st.DataObject, ending: str) -> None:
    whole = bytearray(columnar([FLAT, FLAT], ending))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    survives(
        tmp_path,
        bytes(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole),
        SPAN,
        ending,
    )


GOOD = json.dumps(ROW).encode()


@given(st.binary(max_size=60), KINDS, st.sampled_from(ENDINGS))
@example(b"\xef\xbb\xbf" + GOOD, GENERATION, ".jsonl")
@example(GOOD + b"\n\xef\xbb\xbf" + GOOD, GENERATION, ".jsonl")
@example(GOOD.decode().encode("utf-16"), GENERATION, ".jsonl")
@example(b"\0\0\0\0", GENERATION, ".jsonl")
@example(GOOD.replace(b"anna", b"an\0na"), GENERATION, ".jsonl")
@example(b"[" * 200_000, GENERATION, ".jsonl")
@example(GOOD.replace(b"1,", b"9" * 5000 + b","), CLASSIFICATION, ".jsonl")
@example(GOOD.replace(b'"label": 1', b'"label": 1e999'), CLASSIFICATION, ".jsonl")
@example(GOOD.replace(b'"unused"', b'"text"'), GENERATION, ".jsonl")
@example(b'{"' + b"x" * 100_000 + b'": 1}', GENERATION, ".jsonl")
@example(b'{"a\\nb": 1, "\\ud800": 2}', GENERATION, ".jsonl")
@example(b"t,u\n" + b'"' * 9999, GENERATION, ".csv")
@example(b"[" * 200_000, GENERATION, ".json")
@example(b'{"data": [' + GOOD, CHAT, ".json")
def test_files_of_any_bytes(tmp_path: Path, data: bytes, kind: dict, ending: str) -> None:
    survives(tmp_path, data, kind, ending)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"[1]", "expected a JSON object, not list"),
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
        read_split(resolve_task(TaskConfig(path=str(tmp_path), **GENERATION)), "train")
    assert "train.jsonl:2: " in str(error.value) and said in str(error.value)


def test_a_column_that_is_not_used_may_hold_what_pandas_writes(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a", "answer": "b", "score": NaN}\n')
    assert len(read_split(resolve_task(TaskConfig(path=str(tmp_path), **GENERATION)), "train")) == 1
