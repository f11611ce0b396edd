"""Files of every format: the same rows from each, their lines, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from sparse_llm_ft.config import TaskConfig
from sparse_llm_ft.data.files import ENDINGS, rows_of
from sparse_llm_ft.data.reading import Skipped, read_split
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.data.tasks import BadRow
from sparse_llm_ft.errors import DataError

ROWS = [
    {"text": 'a "quoted" one, with a comma', "answer": "größer"},
    {"text": "two\nlines\tand a tab", "answer": "日本"},
    {"text": " spaced ", "answer": "c"},
]


def quoted(rows: list[dict[str, Any]], delimiter: str) -> str:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(delimiter.join('"' + str(cell).replace('"', '""') + '"' for cell in line) + "\r\n" for line in lines)


def write_file_format(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_stream_format(path: Path, rows: list[dict[str, Any]]) -> None:
    """As `datasets.Dataset.save_to_disk` does."""
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(path.parent / "saved")
    (written,) = (path.parent / "saved").glob("*.arrow")
    written.rename(path)


WRITERS: dict[str, tuple[str, Callable[[Path, list], object]]] = {
    "jsonl": (".jsonl", lambda path, rows: path.write_text("\n\n".join(map(json.dumps, rows)))),
    "json": (".json", lambda path, rows: path.write_text(json.dumps(rows, indent=1))),
    "json under data": (
        ".json",
        lambda path, rows: path.write_text(json.dumps({"version": [1], "data": rows, "n": 3})),
    ),
    "csv": (".csv", lambda path, rows: path.write_bytes(quoted(rows, ",").encode())),
    "csv with mark": (".csv", lambda path, rows: path.write_bytes(b"\xef\xbb\xbf" + quoted(rows, ",").encode())),
    "tsv": (".tsv", lambda path, rows: path.write_bytes(quoted(rows, "\t").encode())),
    "parquet": (".parquet", lambda path, rows: pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)),
    "arrow file": (".arrow", write_file_format),
    "arrow stream": (".arrow", write_stream_format),
}


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_delimiter_of_a_table_is_found(tmp_path: Path, ending: str, delimiter: str, mark: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes((mark + quoted(ROWS, delimiter)).encode())
    assert [row for _, row in rows_of(path)] == ROWS
    (tmp_path / f"b{ending}").write_text(f"id{delimiter}text\n1{delimiter}one\n2{delimiter}two\n")
    assert [row for _, row in rows_of(tmp_path / f"b{ending}")] == [
        {"id": "1", "text": "one"},
        {"id": "2", "text": "two"},
    ]


def test_a_line_that_names_the_delimiter_is_no_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sep=;\r\na;b\r\n1;2,3\r\n4\r\n")
    found = list(rows_of(tmp_path / "a.csv"))
    assert found[0] == (3, {"a": "1", "b": "2,3"}) and found[1][0] == 4 and isinstance(found[1][1], BadRow)


def test_a_bad_row_does_not_change_the_delimiter(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na;b,1\nc;d\n")
    (_, first), (line, second) = rows_of(tmp_path / "a.csv")
    assert first == {"text": "a;b", "label": "1"} and line == 3 and isinstance(second, BadRow)


def config(folder: Path, **settings: Any) -> TaskConfig:
    return TaskConfig(
        **{"name": "custom", "path": str(folder), "prompt": "{text}", "completion": "{answer}"} | settings
    )


@pytest.mark.parametrize("format", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, format: str) -> None:
    ending, write = WRITERS[format]
    write(tmp_path / f"train{ending}", ROWS)
    found = read_split(resolve_task(config(tmp_path)), "train")
    assert [(example.prompt, example.completion) for example in found] == [tuple(row.values()) for row in ROWS]
    assert {ending for ending, _ in WRITERS.values()} == set(ENDINGS)


@pytest.mark.parametrize("format", [name for name in WRITERS if "sv" not in name])
def test_nested_columns_are_read_from_every_format_that_can_hold_them(tmp_path: Path, format: str) -> None:
    ending, write = WRITERS[format]
    answers = {"text": ["b c"], "answer_start": [2]}
    write(tmp_path / f"validation{ending}", [{"question": "q", "context": "a b c", "answers": answers}])
    (example,) = read_split(resolve_task(TaskConfig(name="squad", path=str(tmp_path))), "test")
    assert example.answers == (("b c", 2),)
    write(tmp_path / f"train{ending}", [{"turns": [{"role": r, "content": r} for r in ("user", "assistant")]}])
    (example,) = read_split(resolve_task(config(tmp_path, prompt=None, completion=None, messages="turns")), "train")
    assert example.messages == ({"role": "user", "content": "user"},) and example.completion == "assistant"


@pytest.mark.parametrize("format", WRITERS)
def test_labels_are_read_from_every_format(tmp_path: Path, format: str) -> None:
    ending, write = WRITERS[format]
    write(tmp_path / f"train{ending}", [{"sentence": "a", "label": 1}, {"sentence": "b", "label": 0}])
    assert [e.label for e in read_split(resolve_task(TaskConfig(name="glue/sst2", path=str(tmp_path))), "train")] == [
        1,
        0,
    ]


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("a.csv", "text,answer\na,b\n\n\"c\nc\nc\",d\ne,f\n", [2, 4, 7]),
        ("a.csv", "\ntext,answer\r\na,b\rc,d", [3, 4]),
        ("a.tsv", "text\tanswer\n\"a\n\"\tb\nc,c\td\n", [2, 4]),
        ("a.tsv", "text\tanswer\n\"\tx = 1\n\ty = 2\nreturn\"\tgood\nc\td\n", [2, 5]),
        ("a.json", '[\n{"text": "a"}\n,\n\n {"text":\n "b"}, {"text": "c"}]', [2, 5, 6]),
        ("a.json", '{"data":\n[{"text": "a"}], "b": {}}', [2]),
        ("a.json", " [ ] ", []),
        ("a.jsonl", '\n{"text": "a"}\r\n\r\n{"text": "b"}', [2, 4]),
        ("a.csv", "", []),
        ("a.csv", "text,answer\n", []),
    ],
)  # fmt: skip
def test_lines_are_those_of_the_file(tmp_path: Path, name: str, text: str, lines: list[int]) -> None:
    (tmp_path / name).write_bytes(text.encode())
    found = list(rows_of(tmp_path / name))
    assert [line for line, _ in found] == lines and not any(isinstance(row, BadRow) for _, row in found)


BAD_ROWS = [
    ("a.csv", b"t,u\na,b,c\nd,e\n", 2, "3 fields, but the header has 2"),
    ("a.csv", b"t,u\na\nd,e\n", 2, "1 fields, but the header has 2"),
    ("a.csv", b"t,u\na,\xe9\nd,e\n", 2, "not UTF-8 (Latin-1, perhaps: save the file as UTF-8)"),
    ("a.csv", b"t,u\na,b\0\nd,e\n", 2, "a field holds a NUL byte"),
    ("a.csv", b't,u\n"a"b,c\nd,e\n', 2, "not valid csv (',' expected after '\"')"),
    ("a.csv", b't,u\nd,e\n"a,b\nc,"f"\n', 3, "not valid csv (',' expected after '\"', to line 4)"),
    ("a.tsv", b"t\tu\na,b\nd\te\n", 2, "1 fields, but the header has 2"),
    ("a.tsv", b't\tu\n"Good\t1\nBad"\t0\nd\te\n', 2, "quotation marks make one row of whole ones, to line 3; if"),
    ("a.json", b'[1,\n {"t": "d", "u": "e"}]', 1, "expected a JSON object, not int"),
    ("a.jsonl", b'\xe9\n{"t": "d", "u": "e"}', 1, "not UTF-8 (invalid continuation byte at byte 0; Latin-1, perhaps"),
    ("a.jsonl", b'{"t"\0: 1}\n{"t": "d", "u": "e"}', 1, "not JSON (it holds a NUL byte)"),
    ("a.jsonl", b'{"t": "x"}}\n{"t": "d", "u": "e"}', 1, "not JSON (Extra data at column 11)"),
]


@pytest.mark.parametrize(("name", "data", "line", "problem"), BAD_ROWS)
def test_a_bad_row_is_said_in_its_place_and_the_others_are_read(
    tmp_path: Path, name: str, data: bytes, line: int, problem: str
) -> None:
    (tmp_path / name).write_bytes(data)
    rows = dict(rows_of(tmp_path / name))
    assert isinstance(rows[line], BadRow) and problem in str(rows.pop(line))
    assert [*rows.values()] == [{"t": "d", "u": "e"}]


BAD_FILES = [
    ("a.jsonl", '{"t": "a"}'.encode("utf-16"), 1, "UTF-16 by its byte order mark; save the file as UTF-8"),
    ("a.jsonl", '{"t": "a"}'.encode("utf-32"), 1, "UTF-32 by its byte order mark"),
    ("a.json", "[]".encode("utf-16"), 1, "UTF-16 by its byte order mark"),
    ("a.csv", b"\xfe\xff\0t\0,", 1, "UTF-16 by its byte order mark"),
    ("a.csv", b"t,u,t\na,b,c\n", 1, "the header names column 't' twice"),
    ("a.csv", b"t,\xfcber\na,b\n", 1, "not UTF-8 (Latin-1, perhaps"),
    ("a.csv", b't,"u\na,b\n', 1, "the header is not valid csv (unexpected end of data)"),
    ("a.csv", b't,u\nd,e\n"a,b\nc,d\n', 3, "a quotation mark is never closed"),
    ("a.json", b'[\n{"t": "\xe9"}]', 2, "not UTF-8 (invalid continuation byte; Latin-1"),
    ("a.json", b'[{"t": 1},\n{"t": 2} {"t": 3}]', 2, "not JSON (',' or ']' is needed)"),
    ("a.json", b'[{"t": 1}]\n[]', 2, "not JSON (something stands behind the end of the document)"),
    ("a.json", b'{"t": 1}\n{"t": 2}', 1, "or an object with one under 'data' (JSON lines are for .jsonl)"),
    ("a.json", b'{"data": [], "data": []}', 1, "not JSON (the key 'data' stands twice)"),
    ("a.json", b'{"data": {"t": 1}}', 1, "not JSON (a list of objects is needed)"),
    ("a.json", b'[{"t": 1,\n"t": 2}]', 1, "not JSON (the key 't' stands twice)"),
    ("a.json", b'[{"t": 1},\n' + b"[" * 100_000, 2, "not JSON (nested too deeply)"),
    ("a.json", b"", 1, "not JSON (a list of objects is needed)"),
    ("a.json", b'[{"t": 1},]', 1, "not JSON (Expecting value at column 11)"),
    ("a.parquet", b"", 1, "not readable as parquet"),
    ("a.parquet", b"t,u\n" * 10, 1, "not readable as parquet"),
    ("a.arrow", b"", 1, "not readable as arrow"),
    ("a.arrow", b"ARROW1\0\0" * 10, 1, "not readable as arrow"),
]


@pytest.mark.parametrize(("name", "data", "line", "problem"), BAD_FILES)
def test_a_file_that_cannot_be_read_is_an_error(
    tmp_path: Path, name: str, data: bytes, line: int, problem: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as error:
        list(rows_of(tmp_path / name))
    assert f"{name}:{line}: " in str(error.value) and problem in str(error.value)


def test_a_column_that_stands_twice_in_parquet_is_an_error(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["t", "t"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet:1: it has column 't' twice"):
        list(rows_of(tmp_path / "a.parquet"))


def test_a_damaged_batch_does_not_take_the_rows_before_it_along(tmp_path: Path) -> None:
    write_file_format(tmp_path / "a.arrow", [{"t": f"row {i} of seven" * 40} for i in range(7)])
    data = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(data.replace(b"row 4", b"\xff\xff\xff\xff\xff"))
    rows = rows_of(tmp_path / "a.arrow")
    assert [next(rows)[0] for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(DataError, match=r"a.arrow:5: not readable as arrow"):
        next(rows)


def test_rows_of_a_table_are_read_batch_by_batch(tmp_path: Path) -> None:
    table = pa.table({"t": [f"{i}" for i in range(2500)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [(line, row["t"]) for line, row in rows_of(tmp_path / "a.parquet")] == [(i + 1, f"{i}") for i in range(2500)]


def test_a_long_text_is_no_error_in_csv(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,answer\n" + "x" * 200_000 + ",b\n")
    (example,) = read_split(resolve_task(config(tmp_path)), "train")
    assert len(example.prompt) == 200_000


@pytest.mark.parametrize(("name", "data", "line", "problem"), BAD_ROWS)
def test_bad_rows_of_every_text_format_can_be_left_out(
    tmp_path: Path, name: str, data: bytes, line: int, problem: str
) -> None:
    (tmp_path / f"train{Path(name).suffix}").write_bytes(data)
    skipped = Skipped()
    settings = {"prompt": "{t}", "completion": "{u}", "on_bad_row": "skip"}
    (example,) = read_split(resolve_task(config(tmp_path, **settings)), "train", skipped=skipped)
    assert (example.prompt, example.completion, skipped.count) == ("d", "e", 1)
    assert f":{line}: " in skipped.reasons[0] and problem in skipped.reasons[0]
