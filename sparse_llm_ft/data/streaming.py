"""Streamed training rows, for data that fit neither memory nor disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from sparse_llm_ft.data.reading import Example, Skipped
from sparse_llm_ft.data.tokenization import Preprocessor

T = TypeVar("T")


def shuffled(rows: Iterator[T], buffer_size: int, seed: int, epoch: int) -> Iterator[T]:
    """Yield all rows through a shuffle buffer. The order is a function of rows, `buffer_size`, `seed` and `epoch`."""
    generator = np.random.default_rng([seed, epoch])
    buffer: list[T] = []
    for row in rows:
        if len(buffer) < buffer_size:
            buffer.append(row)
            continue
        place = int(generator.integers(buffer_size))
        yield buffer[place]
        buffer[place] = row
    for place in generator.permutation(len(buffer)):
        yield buffer[int(place)]


class StreamingDataset:
    """Training samples by consumption order: ``samples[i]`` is the run's i-th sample over all epochs.

    Every process reads every row and tokenises only the samples that it needs. A resumed run reads again from the first
    row. A sample that does not fit is an error even under ``task.on_bad_row: skip``: to leave it out, every process
    would have to tokenise every row before it.

    Args:
        open_rows: returns all examples in file order, and counts the rows that it leaves out.
        length: used as the longest sample's length, which is unknown.

    Attributes:
        skipped: rows left out so far in this epoch.
    """

    skipped: Skipped
    _failure: Exception | None

    def __init__(
        self,
        open_rows: Callable[[Skipped], Iterator[Example]],
        encode: Preprocessor,
        buffer_size: int,
        seed: int,
        length: int,
    ) -> None:
        self._open, self._encode, self._buffer_size, self._seed = open_rows, encode, buffer_size, seed
        self.longest = length
        self._begin()

    def __getitem__(self, position: int) -> Any:
        """Read forward to this sample and tokenise it.

        Raises:
            UserError: a row on the way cannot be used, or the sample does not fit.
            TrainingError: the hub is away.
        """
        if position < self._next:
            self._begin()
        if self._failure is not None:  # without reading everything again, which may take hours
            raise self._failure
        while True:
            try:
                example = next(self._rows)
            except Exception as error:
                self._failure = error
                raise
            self._next += 1
            if self._next > position:
                return self._encode(example)

    def _begin(self) -> None:
        self._rows, self._next, self.skipped = self._all(), 0, Skipped()
        self._failure = None

    def _all(self) -> Iterator[Example]:
        epoch = 0
        while True:
            self.skipped = Skipped()
            yield from shuffled(self._open(self.skipped), self._buffer_size, self._seed, epoch)
            epoch += 1
