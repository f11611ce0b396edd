"""Tokenised samples on disk, in the cache of `datasets`. One process per node writes them; every process maps them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, overload

import datasets
import numpy as np
import pyarrow
from transformers import PreTrainedTokenizerBase

from sparse_llm_ft.data.samples import Sample, TextSample
from sparse_llm_ft.data.spans import SpanSample
from sparse_llm_ft.errors import CheckpointError, UserError
from sparse_llm_ft.io.atomic import is_whole
from sparse_llm_ft.io.content_cache import ContentCache, content_key
from sparse_llm_ft.io.strict_json_yaml import read_json

_IDS = pyarrow.list_(pyarrow.int32())


def schema_of(kind: type, is_score: bool) -> pyarrow.Schema:
    """Arrow columns for `Sample`, `TextSample` or `SpanSample`.

    Args:
        is_score: whether labels are regression scores (float64) or class indices (int64).
    """
    if kind is SpanSample:
        numbers = dict.fromkeys(("start", "end", "null", "example"), pyarrow.int32())
        return pyarrow.schema({"ids": _IDS, "type_ids": _IDS} | numbers | {"offsets": pyarrow.list_(_IDS)})
    label = pyarrow.float64() if is_score else pyarrow.int64()
    if kind is Sample:
        columns = {"prompt_ids": _IDS, "completion_ids": _IDS}
    else:
        assert kind is TextSample, kind
        columns = {"ids": _IDS, "type_ids": _IDS}
    return pyarrow.schema(columns | {"label": label, "shortened": pyarrow.bool_()})


_ROWS, _COUNTS = "samples.arrow", "counts.json"
_ROWS_AT_ONCE = 1000
_FORMAT = 6
"""Increase it when the same settings encode differently, or when the file format changes."""

T = TypeVar("T")


class CachedDataset(Sequence[Any]):
    """Samples in a memory-mapped file, built on access.

    Attributes:
        key: the cache key: equal for equal samples.
        lengths: (samples,) int32, the tokens of each sample.
        labels: (samples,), the label of each sample, or None.
        shortened: number of samples that were truncated.
        skipped: number of rows that were left out.
        reasons: why the first few were left out.
    """

    def __init__(self, folder: Path, kind: type[Any]) -> None:
        self.key = folder.name
        self._kind, self._names = kind, [field.name for field in fields(kind)]
        self._rows = datasets.Dataset.from_file(str(folder / _ROWS))
        self.lengths: np.ndarray = _column(self._rows, "length", np.int32)
        self.labels: list[Any] = self._rows["label"][:] if "label" in self._names else [None] * len(self._rows)
        self.shortened = int(_column(self._rows, "shortened", np.int32).sum()) if "shortened" in self._names else 0
        counts = read_json(folder / _COUNTS)
        self.skipped: int = counts["skipped"]
        self.reasons: list[str] = counts["reasons"]

    def beyond(self, limit: int) -> tuple[int, int]:
        """Number of samples with a token id of `limit` or more, and the smallest such id; 0 and 0 if there is none."""
        found, smallest = np.zeros(len(self), dtype=bool), []
        for name in self._names:
            if name not in ("ids", "prompt_ids", "completion_ids"):
                continue
            first = 0
            for chunk in self._rows.data.column(name).chunks:
                values = chunk.values.to_numpy(zero_copy_only=False)
                places = np.flatnonzero(values >= limit)
                found[first + np.searchsorted(chunk.offsets.to_numpy(), places, side="right") - 1] = True
                smallest += [int(values[places].min())] if len(places) else []
                first += len(chunk)
        return int(found.sum()), min(smallest, default=0)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self._rows[index]
        return self._kind(**{name: _frozen(row[name]) for name in self._names})

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


class DatasetSubset(Sequence[Any]):
    """Some of the cached samples, built on access.

    Attributes:
        lengths: (samples,) int32, the tokens of each sample.
    """

    def __init__(self, stored: CachedDataset, indices: Sequence[int]) -> None:
        self._stored, self._indices = stored, indices
        self.lengths = stored.lengths[list(indices)]

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        chosen = self._indices[index]
        return [self._stored[i] for i in chosen] if isinstance(chosen, Sequence) else self._stored[chosen]


def write_cached(
    key: str, kind: type[T], schema: pyarrow.Schema, make: Callable[[], Iterable[T]], counts: Callable[[], Any]
) -> None:
    """Write the samples that `make` yields under `key`, unless a complete entry exists.

    Args:
        schema: the columns of `kind`'s fields; ``length`` is added.
        counts: called after the last sample; returns ``{"skipped": ..., "reasons": [...]}``.

    Raises:
        UserError: the cache is not writable.
    """
    cache = ContentCache(cache_folder(key).parent, _check_complete)
    try:
        cache.write(key, lambda folder: _write(folder, schema, make(), counts))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"HF_DATASETS_CACHE: {cache.folder} cannot be written ({reason})") from error


def cache_folder(key: str) -> Path:
    """The cache folder of `key`."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "sparse_llm_ft" / key


def samples_key(**parts: Any) -> str:
    """The `content_key` of the samples' inputs and of the storage format."""
    return content_key(format=_FORMAT, **parts)


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that decides how a tokenizer turns text into ids."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # slow: the vocabulary alone does not identify a sentencepiece model
        file = Path(getattr(tokenizer, "vocab_file", None) or "")
        content = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
        rules: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), content]
    else:
        rules = json.loads(backend.to_str())
        for state in ("truncation", "padding"):  # they belong to the last call, not to the tokenizer
            rules.pop(state, None)
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return samples_key(
        rules=rules,
        special=special,
        chat=tokenizer.chat_template,
        limit=tokenizer.model_max_length,
        inputs=tokenizer.model_input_names,  # whether there are type ids
        split_special=getattr(tokenizer, "split_special_tokens", None),
    )


def _check_complete(folder: Path) -> Path:
    """Return the folder. Only file sizes are compared: files may be large and are easily rebuilt."""
    if not is_whole(folder):
        raise CheckpointError("a file is missing or cut short")
    return folder


def _write(folder: Path, schema: pyarrow.Schema, samples: Iterable[Any], counts: Callable[[], Any]) -> None:
    schema = schema.append(pyarrow.field("length", pyarrow.int32()))
    with (
        pyarrow.OSFile(str(folder / _ROWS), "wb") as file,
        pyarrow.ipc.new_stream(file, schema) as stream,
    ):
        rest = iter(samples)
        while rows := [asdict(sample) | {"length": sample.length} for sample in islice(rest, _ROWS_AT_ONCE)]:
            stream.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=schema))
    (folder / _COUNTS).write_text(json.dumps(counts()), encoding="utf-8")


def _column(rows: datasets.Dataset, name: str, dtype: Any) -> np.ndarray:
    return rows.data.column(name).to_numpy().astype(dtype)


def _frozen(value: Any) -> Any:
    """The value with tuples in place of lists."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
