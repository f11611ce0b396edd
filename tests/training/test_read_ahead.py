"""Reading ahead in a thread: what was begun is not read again, and nothing else is taken for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest
import torch

from sparse_llm_ft.training.read_ahead import ReadAhead


class Store:
    """Returns the samples' numbers; knows in which thread it was asked, and for what."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.threads: set[int] = set()
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, samples: Sequence[int]) -> torch.Tensor:
        self.threads.add(threading.get_ident())
        self.entered.set()
        assert self.gate.wait(10)
        self.asked.append(list(samples))
        if 13 in samples:
            raise OSError("the disk is away")
        return torch.tensor(samples)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def ahead(store: Store) -> Iterator[ReadAhead]:
    made = ReadAhead(store, torch.device("cpu"))
    yield made
    made.close()


def test_what_was_begun_is_read_once_and_in_another_thread(ahead: ReadAhead, store: Store) -> None:
    ahead.begin([1, 2], [], [3])
    ahead.settle()
    assert store.asked == [[1, 2], [3]] and threading.get_ident() not in store.threads
    assert ahead.take([3]).tolist() == [3] and ahead.take([1, 2]).tolist() == [1, 2]
    assert len(store.asked) == 2
    assert ahead.take([1, 2]).tolist() == [1, 2] and len(store.asked) == 3  # given out once


def test_other_samples_are_read_when_they_are_asked_for(ahead: ReadAhead, store: Store) -> None:
    ahead.begin([1, 2])
    assert ahead.take([2, 1]).tolist() == [2, 1] and ahead.take([5]).tolist() == [5]
    ahead.begin([6])
    assert ahead.take([1, 2]).tolist() == [1, 2]  # begun earlier, and forgotten
    assert len(store.threads) == 1


def test_what_was_begun_before_and_still_runs_is_waited_for(ahead: ReadAhead, store: Store) -> None:
    store.gate.clear()
    ahead.begin([1])
    assert store.entered.wait(10)
    ahead.begin([2])
    threading.Timer(0.2, store.gate.set).start()
    ahead.settle()
    assert store.asked == [[1], [2]]


def test_an_error_is_raised_where_the_samples_are_asked_for(ahead: ReadAhead) -> None:
    ahead.begin([13])
    ahead.settle()
    assert ahead.take([4]).tolist() == [4]
    with pytest.raises(OSError, match="away"):
        ahead.take([13])
