"""Streamed rows: shuffled in a buffer, the same at a position whoever asks, and read no further than asked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sparse_llm_ft.config import parse_config
from sparse_llm_ft.data import dataset
from sparse_llm_ft.data.reading import Example, Skipped
from sparse_llm_ft.data.streaming import StreamingDataset, shuffled
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.data.tasks.mode import CAUSAL_LM
from sparse_llm_ft.errors import DataError

REPEATABLE = settings(derandomize=True, deadline=None, database=None, max_examples=100)


@REPEATABLE
@given(st.integers(0, 60), st.integers(1, 70), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_a_permutation_that_looks_ahead_by_no_more_than_the_buffer(
    rows: int, buffer: int, seed: int, epoch: int
) -> None:
    order = list(shuffled(iter(range(rows)), buffer, seed, epoch))
    assert sorted(order) == list(range(rows))
    assert all(row <= place + buffer for place, row in enumerate(order))
    assert list(shuffled(iter(range(rows)), buffer, seed, epoch)) == order


def test_seed_and_epoch_change_the_order_and_a_buffer_of_one_row_hardly_does() -> None:
    orders = [list(shuffled(iter(range(50)), 20, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(map(tuple, orders))) == 4
    assert list(shuffled(iter(range(50)), 1, 0, 0)) == list(range(50))


def test_no_row_is_read_before_it_is_needed() -> None:
    read: list[int] = []
    rows = (read.append(i) or i for i in range(100))  # type: ignore[func-returns-value]
    list(islice(shuffled(rows, 10, 0, 0), 5))
    assert len(read) == 10 + 5


def test_every_row_may_come_from_any_place_of_the_buffer() -> None:
    """Over many seeds the first row is each of the first 5, about as often: 1000 draws, within five deviations."""
    firsts = [next(shuffled(iter(range(9)), 5, seed, 0)) for seed in range(1000)]
    assert {row: 137 < firsts.count(row) < 263 for row in range(5)} == dict.fromkeys(range(5), True)


class Rows:
    """7 examples; counts what is tokenised."""

    def __init__(self) -> None:
        self.encoded: list[str] = []
        self.opened = 0

    def open(self, skipped: Skipped) -> Iterator[Example]:
        self.opened += 1
        return (Example(f"row {i}", "", ()) for i in range(7))

    def encode(self, example: Example) -> str:
        self.encoded.append(example.prompt)
        return f"{example.prompt} encoded"

    def samples(self, seed: int = 3) -> StreamingDataset:
        return StreamingDataset(self.open, self.encode, 4, seed, 32)


def expected(seed: int = 3) -> list[str]:
    """Three epochs, written down before anything is asked."""
    rows = [f"row {i} encoded" for i in range(7)]
    return [sample for epoch in range(3) for sample in shuffled(iter(rows), 4, seed, epoch)]


def test_samples_go_on_from_epoch_to_epoch() -> None:
    rows = Rows()
    samples = rows.samples()
    assert [samples[i] for i in range(21)] == expected()
    assert rows.opened == 3 and samples.longest == 32
    first, second = expected()[:7], expected()[7:14]
    assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize("start", [0, 3, 6, 7, 16])
def test_a_position_holds_the_same_sample_after_a_restart(start: int) -> None:
    samples = Rows().samples()
    assert [samples[i] for i in range(start, 21)] == expected()[start:]


def test_whoever_looks_back_begins_anew() -> None:
    samples = Rows().samples()
    order = [5, 2, 2, 20, 0]
    assert [samples[i] for i in order] == [expected()[i] for i in order]


def test_only_what_is_asked_for_is_tokenised() -> None:
    """Two ranks with every other sample: together each sample once."""
    ranks = [Rows(), Rows()]
    for rank, rows in enumerate(ranks):
        samples = rows.samples()
        assert [samples[i] for i in range(rank, 14, 2)] == expected()[rank:14:2]
        assert len(rows.encoded) == 7
    both = [f"{row} encoded" for rows in ranks for row in rows.encoded]
    assert sorted(both) == sorted(expected()[:14])


def test_after_a_sample_that_does_not_fit_the_stream_goes_on() -> None:
    """A second look at the place fails as the first did, and what lies around it is still there."""

    class Failing(Rows):
        def encode(self, example: Example) -> str:
            if example.prompt == "row 0":
                raise DataError("rows.jsonl", 1, "does not fit")
            return super().encode(example)

    samples = Failing().samples()
    bad = expected().index("row 0 encoded")
    for _ in range(2):
        with pytest.raises(DataError, match="does not fit"):
            samples[bad]
    assert [samples[i] for i in range(bad + 1, 7)] == expected()[bad + 1 : 7]
    assert [samples[i] for i in range(bad)] == expected()[:bad]


def test_a_reader_that_failed_fails_again_without_reading_again() -> None:
    opened = []

    def rows(skipped: Skipped) -> Iterator[Example]:
        opened.append(skipped)
        yield from Rows().open(skipped)
        raise DataError("rows.jsonl", 8, "not JSON")

    samples = StreamingDataset(rows, Rows().encode, 4, 3, 32)
    for _ in range(2):
        with pytest.raises(DataError, match="not JSON"):
            samples[6]
    assert len(opened) == 1
    assert samples[0] == expected()[0]


def test_the_longest_label_is_looked_for_once_and_not_for_each_row(settings: dict, monkeypatch) -> None:
    asked: list[str] = []
    own = dataset.completion_ids
    monkeypatch.setattr(dataset, "completion_ids", lambda text, *rest: asked.append(text) or own(text, *rest))
    settings["task"] |= {"streaming": True, "labels": ["cake", "book"], "label_column": "answer", "completion": None}
    config = parse_config(settings)
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    streamed = dataset.SplitBuilder(config, resolve_task(config.task), tokenizer, CAUSAL_LM).streamed()
    rows = [Example("anna", " cake", ("cake",), label=0)] * 3
    monkeypatch.setattr(dataset, "examples", lambda *_: iter(rows))
    assert [streamed[i].label for i in range(3)] == [0, 0, 0]
    assert asked == [" cake", " book"]
