"""Several short samples in one sequence."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sparse_llm_ft.data.samples import Pack


def pack_lengths(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Assign samples to sequences by best-fit decreasing: each sample goes where it leaves the least room.

    It needs at most 11/9 of the fewest possible sequences, plus a constant (Johnson et al., 1974).

    Args:
        lengths: tokens of each sample, at most `capacity` each.

    Returns:
        The sample indices of each sequence, ascending; sequences are ordered by their first sample.
    """
    room: list[tuple[int, int]] = []  # sorted: (free tokens, sequence) of sequences that are not full
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i)):
        length = int(lengths[index])
        place = bisect_left(room, (length, -1))
        if place == len(room):
            rest, number = capacity, len(packs)
            packs.append([])
        else:
            rest, number = room.pop(place)
        packs[number].append(index)
        if rest > length:
            insort(room, (rest - length, number))
    return sorted(sorted(pack) for pack in packs)


class PackedDataset(Sequence[Pack]):
    """Sequences of several samples each.

    Attributes:
        lengths: (sequences,) int32, the tokens of each sequence.
    """

    def __init__(self, samples: Sequence[Any], lengths: Sequence[int] | np.ndarray, capacity: int) -> None:
        self._samples, self._packs = samples, pack_lengths(lengths, capacity)
        self.lengths = np.array([sum(int(lengths[i]) for i in pack) for pack in self._packs], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Pack(tuple(self._samples[i] for i in self._packs[index]))

    def __iter__(self) -> Iterator[Pack]:
        return (self[i] for i in range(len(self)))
