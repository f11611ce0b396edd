"""Which samples share a sequence, and the tensors of sequences that hold several."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_llm_ft.data.collate import IGNORE_INDEX, collate_packed
from sparse_llm_ft.data.packing import PackedDataset, pack_lengths
from sparse_llm_ft.data.samples import Pack, Sample

REPEATABLE = settings(derandomize=True, deadline=None, database=None, max_examples=150)
CAPACITY = 12


def sample(prompt: int, completion: int, first: int = 5) -> Sample:
    ids = tuple(range(first, first + prompt + completion))
    return Sample(ids[:prompt], ids[prompt:])


def fewest(lengths: list[int], capacity: int, packs: tuple[int, ...] = ()) -> int:
    """The fewest packs there can be: the first sample into every pack in turn, or into one of its own."""
    if not lengths:
        return len(packs)
    length, *rest = lengths
    found = fewest(rest, capacity, (*packs, length))
    for i, used in enumerate(packs):
        if used + length <= capacity and used not in packs[:i]:
            found = min(found, fewest(rest, capacity, (*packs[:i], used + length, *packs[i + 1 :])))
    return found


@REPEATABLE
@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 120))
def test_every_sample_lies_in_one_pack_and_none_is_too_full(lengths: list[int], capacity: int) -> None:
    packs = pack_lengths(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in pack) <= capacity for pack in packs)
    assert packs == sorted(map(sorted, packs)), "in their order, by the first of each"
    assert pack_lengths(np.array(lengths, dtype=np.int32), capacity) == packs


@REPEATABLE
@given(st.lists(st.integers(1, 50), max_size=60))
def test_a_sample_goes_where_it_leaves_the_least_room(lengths: list[int]) -> None:
    """Best-fit decreasing, done by looking at every pack."""
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rooms = [50 - sum(lengths[i] for i in pack) - lengths[index] for pack in packs]
        fits = [number for number, room in enumerate(rooms) if room >= 0]
        if fits:
            packs[min(fits, key=lambda number: (rooms[number], number))].append(index)
        else:
            packs.append([index])
    assert pack_lengths(lengths, 50) == sorted(map(sorted, packs))


@REPEATABLE
@given(st.lists(st.integers(1, CAPACITY), max_size=9))
def test_never_many_more_packs_than_are_needed(lengths: list[int]) -> None:
    assert len(pack_lengths(lengths, CAPACITY)) <= 11 / 9 * fewest(sorted(lengths)[::-1], CAPACITY) + 1


@pytest.mark.parametrize(
    ("lengths", "packs"),
    [
        ([], []),
        ([12], [[0]]),
        ([7, 5, 12, 6, 6], [[0, 1], [2], [3, 4]]),
        ([3, 4, 8, 9], [[0, 3], [1, 2]]),  # first-fit in the given order would need a third
        ([12, 1], [[0], [1]]),
    ],
)
def test_packs_written_out_by_hand(lengths: list[int], packs: list[list[int]]) -> None:
    assert pack_lengths(lengths, CAPACITY) == packs


def test_packed_samples_are_a_sequence_of_packs() -> None:
    samples = [sample(4, 3), sample(2, 3), sample(9, 3), sample(3, 3), sample(5, 1)]
    packed = PackedDataset(samples, [s.length for s in samples], CAPACITY)
    expected = [Pack((samples[0], samples[1])), Pack((samples[2],)), Pack((samples[3], samples[4]))]
    assert len(packed) == 3 and list(packed) == expected == packed[:] == [packed[i] for i in range(3)]
    assert packed[1:] == expected[1:] and packed[-1] == expected[-1]
    assert packed.lengths.dtype == np.int32
    assert packed.lengths.tolist() == [12, 12, 12] == [pack.length for pack in expected]
    assert [pack.supervised for pack in expected] == [6, 3, 4]
    assert expected[0].ids == (
        *samples[0].prompt_ids,
        *samples[0].completion_ids,
        *samples[1].prompt_ids,
        *samples[1].completion_ids,
    )


def test_in_a_batch_of_packs_positions_begin_anew_and_only_completions_have_labels() -> None:
    one, two, three = Sample((5, 6), (7, 2)), Sample((8,), (9, 2)), Sample((10, 11, 12), (2,))
    batch = collate_packed([Pack((one, two)), Pack((three,))], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2, 8, 9, 2], [10, 11, 12, 2, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1, 1, 1, 1, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2]]
    no = IGNORE_INDEX
    assert batch["labels"].tolist() == [[no, no, 7, 2, no, 9, 2], [no, no, no, 2, no, no, no]]
