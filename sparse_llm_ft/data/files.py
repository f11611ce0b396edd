"""Reads rows and their line numbers from local files of every supported format. Imports no torch.

A bad row is yielded as a `BadRow`, so that the caller may continue. An error that makes the rest of the file unreadable
is raised.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from sparse_llm_ft.data.tasks import BadRow, Row
from sparse_llm_ft.errors import DataError, UserError, reason_of
from sparse_llm_ft.io.strict_json_yaml import ParseError, parse_json, parse_json_rows

Rows = Iterator[tuple[int, Row | BadRow]]

_BYTE_ORDER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_LATIN = "Latin-1, perhaps: save the file as UTF-8"
_UNDECODED = re.compile("[\udc80-\udcff]")
_LONGEST_FIELD = 2**24
_ENDED = "unexpected end of data"
"""csv's message for a missing closing quotation mark."""
_DELIMITERS, _SNIFFED = (",", ";", "\t", "|"), 6
_MARKED = re.compile(r"sep=([^\w\s]|\t)\r?\n?")
_COMPRESSIONS: dict[str, Any] = {".gz": gzip.open, ".zst": None, ".bz2": bz2.open, ".xz": lzma.open}
_BATCH = 1000
"""Rows of a columnar file that are converted to Python values at a time."""


def rows_of(path: Path) -> Rows:
    """Yield (line, row) for each row of a file whose ending is one of `ALL_ENDINGS`.

    Lines count from 1; for parquet and arrow files the row number takes the line's place. Blank lines of text files are
    skipped.

    Raises:
        DataError: the file, or the rest of it, does not have the format of its ending.
        UserError: the file cannot be opened or read.
    """
    try:
        yield from _READERS[_format(path)](path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be decompressed ({reason_of(error)})") from None


def _format(path: Path) -> str:
    """The ending that tells a file's format, without that of its compression."""
    return path.with_suffix("").suffix if path.suffix in _COMPRESSIONS else path.suffix


def _opened(path: Path) -> io.BufferedReader:
    """The file's bytes, decompressed."""
    if path.suffix == ".zst":
        import pyarrow  # slow to import; Python 3.11 has no zstd of its own

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    unpack: Any = _COMPRESSIONS.get(path.suffix) or (lambda place, mode: place.open(mode))
    return io.BufferedReader(unpack(path, "rb"))


def _text(path: Path) -> TextIO:
    """A table's text, decompressed. Invalid UTF-8 decodes to lone surrogates."""
    return io.TextIOWrapper(_opened(path), encoding="utf-8-sig", errors="surrogateescape", newline="")


def _json_lines(path: Path) -> Rows:
    with _opened(path) as file:
        _check_byte_order_mark(path, file.peek(4)[:4])
        for line, raw in enumerate(file, 1):
            row = _json_line(raw, first=line == 1)
            if row is not None:
                yield line, row


def _json_line(raw: bytes, first: bool) -> Row | BadRow | None:
    try:
        text = raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 ({error.reason} at byte {error.start}; {_LATIN})")
    if "\0" in text:
        return BadRow("not JSON (it holds a NUL byte)")
    if not text.strip():
        return None
    try:
        return _as_row(parse_json(text, constants=True))  # an unused column may hold NaN, as pandas writes it
    except ParseError as error:
        return BadRow(f"not JSON ({error})")


def _as_row(value: Any) -> Row | BadRow:
    return value if isinstance(value, dict) else BadRow(f"expected a JSON object, not {type(value).__name__}")


def _json(path: Path) -> Rows:
    with _opened(path) as file:
        data = file.read()
    _check_byte_order_mark(path, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(path, line, f"not UTF-8 ({error.reason}; {_LATIN})") from None
    del data
    rows = parse_json_rows(text, key="data")
    while True:
        try:
            line, value = next(rows)
        except StopIteration:
            return
        except ParseError as error:
            raise DataError(path, error.line or 1, f"not JSON ({error})") from None
        yield line, _as_row(value)


def _table(path: Path) -> Rows:
    """CSV or TSV with a header. Invalid UTF-8 decodes to lone surrogates, which `_wrong_field` finds."""
    with _opened(path) as file:
        _check_byte_order_mark(path, file.read(4))
    csv.field_size_limit(_LONGEST_FIELD)  # the default limit is 128 KiB
    ending = _format(path)
    delimiter, before = _delimiter(path, "\t" if ending == ".tsv" else ",")
    with _text(path) as file:
        for _ in range(before):
            file.readline()
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = before + reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if header is None:
                    raise DataError(path, line, f"the header is not valid {ending[1:]} ({error})") from None
                if _ENDED in str(error):  # the open quotation may have swallowed good rows
                    raise DataError(path, line, "a quotation mark is never closed") from None
                lines = f", to line {before + reader.line_num}" if before + reader.line_num > line else ""
                yield line, BadRow(f"not valid {ending[1:]} ({error}{lines})")
                continue
            if not fields:
                continue
            if header is None:
                header = _header(path, line, fields)
            elif ending == ".tsv" and _swallows_rows(header, fields):
                yield (
                    line,
                    BadRow(
                        f"quotation marks make one row of whole ones, to line {before + reader.line_num}; if the file "
                        "has no quoting, double its quotation marks, or save it as JSON lines"
                    ),
                )
            else:
                yield line, _fields(header, fields)


def _delimiter(path: Path, usual: str) -> tuple[str, int]:
    """The character between a table's fields, and the number of lines before its header: 1 if the first line is
    ``sep=;``, as spreadsheets write it.

    It is the usual one, unless only another one gives the header and the first rows the same number of fields, above 1.
    """
    with _text(path) as file:
        if marked := _MARKED.fullmatch(file.readline()):
            return marked[1], 1
    for delimiter in (usual, *(other for other in _DELIMITERS if other != usual)):
        with _text(path) as file:
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            try:
                lengths = {len(row) for row in islice(filter(None, rows), _SNIFFED)}
            except csv.Error:
                continue
        if len(lengths) == 1 and lengths != {1}:
            return delimiter, 0
    return usual, 0


def _header(path: Path, line: int, names: list[str]) -> list[str]:
    wrong = _wrong_field(names)
    twice = [name for name in names if names.count(name) > 1]
    if wrong or twice:
        raise DataError(path, line, wrong or f"the header names column {twice[0]!r:.60} twice")
    return names


def _fields(header: list[str], fields: list[str]) -> Row | BadRow:
    if len(fields) != len(header):
        return BadRow(f"{len(fields)} fields, but the header has {len(header)}")
    wrong = _wrong_field(fields)
    return BadRow(wrong) if wrong else dict(zip(header, fields, strict=True))


def _swallows_rows(header: list[str], fields: list[str]) -> bool:
    """Whether a row of several lines looks like as many rows of a file whose quotation marks are text, as GLUE's."""
    lines = "\t".join(fields).split("\n")
    indented = any(line.startswith("\t") for line in lines)  # code, and a row whose first field is empty
    return (
        min(len(lines), len(header)) > 1 and not indented and all(line.count("\t") == len(header) - 1 for line in lines)
    )


def _wrong_field(fields: list[str]) -> str | None:
    for field in fields:
        if "\0" in field:
            return "a field holds a NUL byte"
        if not field.isascii() and _UNDECODED.search(field):
            return f"not UTF-8 ({_LATIN})"
    return None


def _check_byte_order_mark(path: Path, start: bytes) -> None:
    for mark, name in _BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            raise DataError(path, 1, f"{name} by its byte order mark; save the file as UTF-8")


def _columnar(path: Path) -> Rows:
    """Parquet and arrow, batch by batch from a memory map."""
    import pyarrow  # slow to import

    number = 0
    batches = _parquet_batches(path) if path.suffix == ".parquet" else _arrow_batches(path)
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            batch.validate(full=True)  # offsets of a damaged file may point anywhere
            names = batch.schema.names
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise DataError(path, 1, f"it has column {twice[0]!r:.60} twice")
            rows = batch.to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise DataError(path, number + 1, f"not readable as {path.suffix[1:]} ({reason_of(error, 200)})") from None
        for row in rows:
            number += 1
            yield number, row


def _parquet_batches(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
        yield from file.iter_batches(batch_size=_BATCH)


def _arrow_batches(path: Path) -> Iterator[Any]:
    """Batches of Arrow's file format or of its stream format, which `datasets` writes."""
    import pyarrow.ipc

    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(source))
        for batch in batches:
            yield from (batch.slice(start, _BATCH) for start in range(0, batch.num_rows, _BATCH))


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _columnar,
    ".arrow": _columnar,
}
ENDINGS = tuple(_READERS)
COMPRESSED = tuple(_COMPRESSIONS)
ALL_ENDINGS = (
    *ENDINGS,
    *(ending + packed for ending, read in _READERS.items() if read is not _columnar for packed in COMPRESSED),
)
"""Endings of files with rows: a format's, with that of a compression behind it if the format is text."""
