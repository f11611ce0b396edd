"""The order of samples: a permutation each epoch, and the same for every way of sharing the work."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_llm_ft.data.sampler import SequentialSampler, ShuffledSampler


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    stream = ShuffledSampler(13, seed=4)
    epochs = [[stream.index(e * 13 + i) for i in range(13)] for e in range(3)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [ShuffledSampler(13, 4).index(i) for i in range(13)] == epochs[0]
    assert [ShuffledSampler(13, 5).index(i) for i in range(13)] != epochs[0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_step_by_step_the_same_samples_for_every_division(world_size, micro_batch_size, accumulation) -> None:
    stream = ShuffledSampler(29, seed=0)
    total = world_size * micro_batch_size * accumulation
    for step in range(5):
        consumed = step * total
        shares = stream.micro_batches(consumed, total, micro_batch_size, world_size)
        assert len(shares) == world_size
        assert all(len(share) == accumulation and all(len(m) == micro_batch_size for m in share) for share in shares)
        got = [i for a in range(accumulation) for rank in range(world_size) for i in shares[rank][a]]
        assert got == [stream.index(p) for p in range(consumed, consumed + total)]


def test_a_grown_batch_or_another_world_neither_repeats_nor_skips() -> None:
    """Steps of 4, then of 12 on more ranks: together one unbroken sequence."""
    stream, seen, consumed = ShuffledSampler(17, seed=2), [], 0
    for total, micro, world in ((4, 2, 1), (4, 1, 2), (12, 3, 2), (12, 1, 4)):
        shares = stream.micro_batches(consumed, total, micro, world)
        seen += [i for a in range(len(shares[0])) for share in shares for i in share[a]]
        consumed += total
    assert seen == [stream.index(p) for p in range(consumed)]


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="8 is not a multiple of 6"):
        ShuffledSampler(5, 0).micro_batches(0, 8, 3, 2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_lengths_sort_a_step_and_change_none_of_its_samples(world_size: int, micro_batch_size: int) -> None:
    """Samples of like length share a micro-batch, whoever has it; the step is the one that has no lengths."""
    stream, total = ShuffledSampler(29, seed=0), 48
    lengths = np.random.default_rng(0).integers(1, 9, 29).astype(np.int32)
    for step in range(4):
        shares = stream.micro_batches(step * total, total, micro_batch_size, world_size, lengths)
        assert all(len(micro) == micro_batch_size for share in shares for micro in share)
        got = [i for a in range(len(shares[0])) for share in shares for i in share[a]]
        assert sorted(got) == sorted(stream.index(p) for p in range(step * total, (step + 1) * total))
        assert [int(lengths[i]) for i in got] == sorted((int(lengths[i]) for i in got), reverse=True)


def test_of_equal_lengths_the_order_is_that_of_the_stream() -> None:
    stream = ShuffledSampler(29, seed=0)
    plain = stream.micro_batches(5, 12, 3, 2)
    assert stream.micro_batches(5, 12, 3, 2, [7] * 29) == plain


def test_what_is_streamed_comes_in_order() -> None:
    shares = SequentialSampler().micro_batches(8, 8, 2, 2)
    assert shares == [[[8, 9], [12, 13]], [[10, 11], [14, 15]]]
