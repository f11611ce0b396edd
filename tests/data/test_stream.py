"""The order of samples: a permutation each epoch, and the same for every way of sharing the work."""

from __future__ import annotations

import pytest

from sparse_llm_ft.data.stream import SampleStream


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    stream = SampleStream(13, seed=4)
    epochs = [[stream.index(e * 13 + i) for i in range(13)] for e in range(3)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [SampleStream(13, 4).index(i) for i in range(13)] == epochs[0]
    assert [SampleStream(13, 5).index(i) for i in range(13)] != epochs[0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_step_by_step_the_same_samples_for_every_division(world_size, micro_batch_size, accumulation) -> None:
    stream = SampleStream(29, seed=0)
    total = world_size * micro_batch_size * accumulation
    for step in range(5):
        consumed = step * total
        shares = [
            list(stream.micro_batches(consumed, total, micro_batch_size, rank, world_size))
            for rank in range(world_size)
        ]
        assert all(len(share) == accumulation and all(len(m) == micro_batch_size for m in share) for share in shares)
        got = [i for a in range(accumulation) for rank in range(world_size) for i in shares[rank][a]]
        assert got == [stream.index(p) for p in range(consumed, consumed + total)]


def test_a_grown_batch_or_another_world_neither_repeats_nor_skips() -> None:
    """Steps of 4, then of 12 on more ranks: together one unbroken sequence."""
    stream, seen, consumed = SampleStream(17, seed=2), [], 0
    for total, micro, world in ((4, 2, 1), (4, 1, 2), (12, 3, 2), (12, 1, 4)):
        shares = [list(stream.micro_batches(consumed, total, micro, rank, world)) for rank in range(world)]
        seen += [i for a in range(len(shares[0])) for share in shares for i in share[a]]
        consumed += total
    assert seen == [stream.index(p) for p in range(consumed)]


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="8 is not a multiple of 6"):
        next(SampleStream(5, 0).micro_batches(0, 8, 3, 0, 2))
