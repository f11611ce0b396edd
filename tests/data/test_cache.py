"""Encoded samples on disk: what goes in comes out, once, complete, and under the key of what it was made of."""

from __future__ import annotations

import copy
import errno
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from sparse_llm_ft.data.cache import (
    CachedDataset,
    DatasetSubset,
    cache_folder,
    samples_key,
    schema_of,
    tokenizer_key,
    write_cached,
)
from sparse_llm_ft.data.samples import Sample, TextSample
from sparse_llm_ft.data.spans import SpanSample
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.io import content_cache

NOTHING_SKIPPED = {"skipped": 0, "reasons": []}
SAMPLES = [Sample((5, 6), (7, 2)), Sample((8,), (2,), shortened=True), Sample((9, 10, 11), (12, 13, 2))]
OFFSETS = ((None, (0, 4), (5, 70000)), (None, None, (2, 3)))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("samples", "is_score"),
    [
        (SAMPLES, False),
        ([replace(sample, label=i) for i, sample in enumerate(SAMPLES)], False),
        ([replace(sample, label=i / 3) for i, sample in enumerate(SAMPLES)], True),
        ([TextSample((2, 5, 3), (0, 0, 1), 1), TextSample((2, 3), (0, 0), 0, shortened=True)], False),
        ([TextSample((2, 5, 3), None, 0.1), TextSample((2, 3), None, 5.0)], True),
        ([SpanSample((2, 5, 128255), (0, 1, 1), 1, 2, 0, i, offsets) for i, offsets in enumerate(OFFSETS)], False),
        ([SpanSample((2, 5, 6), None, 1, 2, 0, 0, OFFSETS[0])], False),
    ],
)
def test_samples_come_back_as_they_were(samples: list, is_score: bool) -> None:
    kind = type(samples[0])
    write_cached("k", kind, schema_of(kind, is_score), lambda: samples, lambda: NOTHING_SKIPPED)
    stored = CachedDataset(cache_folder("k"), kind)
    assert len(stored) == len(samples)
    assert list(stored) == samples == stored[:] == [stored[i] for i in range(len(samples))]
    assert stored[-1] == samples[-1] and stored[1:] == samples[1:]
    assert stored.lengths.dtype == np.int32 and stored.lengths.tolist() == [sample.length for sample in samples]
    assert stored.labels == [getattr(sample, "label", None) for sample in samples]
    assert [type(label) for label in stored.labels] == [type(getattr(sample, "label", None)) for sample in samples]
    assert stored.shortened == sum(getattr(sample, "shortened", False) for sample in samples)
    assert (stored.skipped, stored.reasons) == (0, [])
    assert hash(stored[0]) == hash(samples[0]), "tuples all through, no lists"


def test_more_samples_than_are_written_at_once() -> None:
    samples = [Sample((i,) * (1 + i % 7), (2,)) for i in range(2500)]
    write_cached("k", Sample, schema_of(Sample, False), lambda: iter(samples), lambda: NOTHING_SKIPPED)
    assert list(CachedDataset(cache_folder("k"), Sample)) == samples


def test_chosen_samples_are_made_when_they_are_asked_for() -> None:
    write_cached("k", Sample, schema_of(Sample, False), lambda: SAMPLES, lambda: NOTHING_SKIPPED)
    stored = CachedDataset(cache_folder("k"), Sample)
    chosen = DatasetSubset(stored, [2, 0])
    assert list(chosen) == [SAMPLES[2], SAMPLES[0]] == chosen[:] and chosen[-1] == SAMPLES[0] and len(chosen) == 2
    assert chosen.lengths.tolist() == [SAMPLES[2].length, SAMPLES[0].length]
    assert DatasetSubset(stored, []).lengths.tolist() == [] == list(DatasetSubset(stored, []))
    with pytest.raises(IndexError):
        chosen[2]


def test_no_samples_at_all() -> None:
    counts = {"skipped": 7, "reasons": ["a", "b"]}
    write_cached("k", Sample, schema_of(Sample, False), lambda: [], lambda: counts)
    stored = CachedDataset(cache_folder("k"), Sample)
    assert (len(stored), stored.lengths.tolist(), stored.labels, stored.shortened) == (0, [], [], 0)
    assert (stored.skipped, stored.reasons) == (7, ["a", "b"])


def test_what_is_there_is_not_made_again_and_counts_are_taken_at_the_end() -> None:
    made: list[str] = []

    def make(name: str) -> Iterator[Sample]:
        made.append(name)
        yield from SAMPLES
        made.append("all")

    for key in ("one", "one", "two"):
        counts = lambda: {"skipped": len(made), "reasons": []}  # noqa: E731
        write_cached(key, Sample, schema_of(Sample, False), lambda key=key: make(key), counts)
    assert made == ["one", "all", "two", "all"]
    assert [CachedDataset(cache_folder(key), Sample).skipped for key in ("one", "two")] == [2, 4]


def _write_slowly(folder: Path, name: str) -> None:
    """In another process: says that it makes samples, and finishes once it may."""
    datasets.config.HF_DATASETS_CACHE = folder / "cache"

    def make() -> Iterator[Sample]:
        (folder / f"{name}-makes").touch()
        yield from SAMPLES * 1000  # some batches are in the file already when it waits
        while not (folder / f"{name}-may-end").exists():
            time.sleep(0.01)
        yield SAMPLES[0]

    write_cached("k", Sample, schema_of(Sample, False), make, lambda: NOTHING_SKIPPED)
    (folder / f"{name}-done").touch()


def _start(folder: Path, name: str) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=_write_slowly, args=(folder, name), daemon=True)
    process.start()
    return process


def _until(path: Path) -> None:
    limit = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < limit, path
        time.sleep(0.01)


def test_a_second_job_waits_and_finds_what_the_first_one_made(tmp_path: Path) -> None:
    first = _start(tmp_path, "first")
    _until(tmp_path / "first-makes")
    second = _start(tmp_path, "second")
    time.sleep(0.3)
    assert not (tmp_path / "second-makes").exists() and not (tmp_path / "second-done").exists()
    (tmp_path / "first-may-end").touch()
    for process in (first, second):
        process.join(30)
        assert process.exitcode == 0
    assert (tmp_path / "second-done").exists() and not (tmp_path / "second-makes").exists()
    assert len(CachedDataset(cache_folder("k"), Sample)) == 3001


def test_a_writer_that_is_killed_leaves_nothing_that_counts(tmp_path: Path) -> None:
    process = _start(tmp_path, "first")
    _until(tmp_path / "first-makes")
    _until(cache_folder("k").parent / ".tmp-k" / "samples.arrow")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL and not cache_folder("k").exists()
    write_cached("k", Sample, schema_of(Sample, False), lambda: SAMPLES, lambda: NOTHING_SKIPPED)
    assert list(CachedDataset(cache_folder("k"), Sample)) == SAMPLES
    assert {path.name for path in cache_folder("k").parent.iterdir()} == {"k", ".k.lock"}


def test_a_row_that_fails_leaves_nothing_either() -> None:
    def fail() -> Iterator[Sample]:
        yield SAMPLES[0]
        raise ValueError("row 2")

    with pytest.raises(ValueError, match="row 2"):
        write_cached("k", Sample, schema_of(Sample, False), fail, lambda: NOTHING_SKIPPED)
    assert not cache_folder("k").exists()


def test_the_key_of_values_is_that_of_their_content() -> None:
    assert samples_key(a=1, b=("x", None)) == samples_key(b=["x", None], a=1)
    assert len({samples_key(a=1), samples_key(a=2), samples_key(b=1), samples_key(a="1"), samples_key(a=None)}) == 5


def changed_vocabulary(tokenizer) -> None:
    tokenizer.add_tokens(["station-master"])


def changed_attribute(name: str, value: object):
    return lambda tokenizer: setattr(tokenizer, name, value)


CHANGES = {
    "vocabulary": changed_vocabulary,
    "end": changed_attribute("eos_token", "."),
    "template": changed_attribute("chat_template", "{{ messages[0]['content'] }}"),
    "limit": changed_attribute("model_max_length", 17),
    "type ids": changed_attribute("model_input_names", ["input_ids", "token_type_ids", "attention_mask"]),
    "special tokens in texts": changed_attribute("split_special_tokens", True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_tokenizer_that_writes_otherwise_has_another_key(change: str, model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    before = tokenizer_key(tokenizer)
    CHANGES[change](tokenizer)
    assert tokenizer_key(tokenizer) != before


def test_use_and_place_do_not_change_a_tokenizers_key(model_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    before = tokenizer_key(tokenizer)
    tokenizer("anna meets tom at the park", truncation="longest_first", max_length=3)
    tokenizer(["anna meets tom", "red"], padding="max_length", max_length=9, truncation=True)
    assert json.loads(tokenizer.backend_tokenizer.to_str())["truncation"] is not None, "it has left its trace"
    assert tokenizer_key(tokenizer) == before == tokenizer_key(copy.deepcopy(tokenizer))
    tokenizer.save_pretrained(tmp_path / "elsewhere")
    assert tokenizer_key(AutoTokenizer.from_pretrained(tmp_path / "elsewhere")) == before


def _read_only(*_: object) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def test_a_read_only_cache_serves_what_is_there_and_says_where_it_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = lambda key: write_cached(  # noqa: E731
        key, Sample, schema_of(Sample, False), lambda: SAMPLES, lambda: NOTHING_SKIPPED
    )
    write("k")
    monkeypatch.setattr(content_cache, "FolderLock", _read_only)
    write("k")
    assert list(CachedDataset(cache_folder("k"), Sample)) == SAMPLES
    with pytest.raises(UserError, match=r"HF_DATASETS_CACHE: .* cannot be written \(Read-only file system\)"):
        write("other")


def test_a_damaged_entry_is_logged_and_made_anew(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        write_cached("k", Sample, schema_of(Sample, False), lambda: SAMPLES, lambda: NOTHING_SKIPPED)
        assert list(CachedDataset(cache_folder("k"), Sample)) == SAMPLES
        path = cache_folder("k") / "samples.arrow"
        path.write_bytes(path.read_bytes()[:-1])
    (line,) = (record.message for record in caplog.records)
    assert "/k: the stored entry cannot be used and is made anew (" in line and "\n" not in line
