"""Masks and moments of a shard: parameters cut anywhere into flat partitions, read and written by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_llm_ft.engine.shards import Shards, ShardSlice
from sparse_llm_ft.optim import AdapterOptimizer, EntryMask, RowColumnMask
from sparse_llm_ft.plan import IndexMask

SHAPES = {"a": (3, 5), "b": (4, 2), "c": (6,)}


def rows(*kept: int) -> RowColumnMask:
    """Of b."""
    return RowColumnMask(0, IndexMask(4, kept), 2)


def columns(*kept: int) -> RowColumnMask:
    """Of a."""
    return RowColumnMask(1, IndexMask(5, kept), 5)


def cut(sizes: dict[str, int], edges: list[int], rank: int) -> dict[str, ShardSlice | None]:
    """The places of rank `rank` where all parameters lie one after the other and are cut at `edges`."""
    low, high = edges[rank], edges[rank + 1]
    shard_slices: dict[str, ShardSlice | None] = {}
    begin = 0
    for name, size in sizes.items():
        start, stop = max(begin, low), min(begin + size, high)
        shard_slices[name] = ShardSlice(0, start - low, start - begin, stop - start) if start < stop else None
        begin += size
    return shard_slices


def shards_of(edges: list[int], rank: int, masks: dict) -> Shards:
    """One rank's, which sums nothing over ranks."""
    sizes = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    master = torch.nn.Parameter(torch.zeros(edges[rank + 1] - edges[rank] + 3))  # and padding
    optimizer = AdapterOptimizer([master])
    groups = [(optimizer.param_groups[0], master)]
    return Shards(optimizer, groups, SHAPES, cut(sizes, edges, rank), masks, False, torch.device("cpu"))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 29), st.integers(0, 2**31 - 1), st.booleans())
def test_ranks_together_hold_every_kept_entry_once(edge: int, seed: int, lines: bool) -> None:
    """Two ranks, cut at any entry, a row in the middle included: their parts sum to the whole."""
    generator = torch.Generator().manual_seed(seed)
    entries = {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in SHAPES.items() if name != "c"}
    masks: dict = {name: EntryMask(mask) for name, mask in entries.items()}
    if lines:
        entries = {"a": torch.zeros(3, 5, dtype=torch.bool), "b": torch.zeros(4, 2, dtype=torch.bool)}
        entries["a"][:, [0, 3]] = True
        entries["b"][[1, 2]] = True
        masks = {"a": columns(0, 3), "b": rows(1, 2)}
    ranks = [shards_of([0, edge, 29], rank, masks) for rank in (0, 1)]
    held = sum(len(s.optimizer.kept[s.masters[0][1]]) if s.optimizer.kept else s.masters[0][1].numel() for s in ranks)
    if all(s.optimizer.kept for s in ranks):
        assert held == sum(int(mask.sum()) for mask in entries.values()) + 6
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    moments = {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
    for shard in ranks:
        shard.write(values)
        shard.write(moments, "exp_avg")
    # In any order, and as they were when the read began.
    for names in (list(SHAPES), list(SHAPES)[::-1]):
        together = [shard.begin_read(names) for shard in ranks]
        for shard in ranks:
            shard.write({name: torch.zeros(SHAPES[name]) for name in names})
        found_now = [read() for read in together]
        for name, value in values.items():
            assert torch.equal(sum(found[name] for found in found_now), value)
        for shard in ranks:
            shard.write(values)
    for name, value in values.items():
        moment = moments[name]
        assert torch.equal(sum(shard.read([name])[name] for shard in ranks), value)
        expected = moment * entries[name] if name in entries else moment.clone()
        found = sum(shard.read([name], "exp_avg")[name] for shard in ranks)
        # A partition in which nothing is masked keeps moments of all its entries.
        for shard in ranks:
            place = shard.shard_slices[name]
            if place is not None and not shard.optimizer.kept:
                window = slice(place.start, place.start + place.length)
                expected.view(-1)[window] = moment.view(-1)[window]
        assert torch.equal(found, expected)


@pytest.mark.parametrize("mask", [columns(0, 3), RowColumnMask(0, IndexMask(3, (1,)), 5)])
def test_kept_lines_of_any_window_are_those_of_the_whole(mask: RowColumnMask) -> None:
    whole = set(mask.indices(0, 15).tolist())
    assert whole == ({0, 3, 5, 8, 10, 13} if mask.dimension else {5, 6, 7, 8, 9})
    for start in range(16):
        for stop in range(start, 16):
            assert mask.indices(start, stop).tolist() == [i - start for i in sorted(whole) if start <= i < stop]


def test_the_norm_leaves_masked_entries_out() -> None:
    shards = shards_of([0, 29], 0, {"a": columns(0), "b": rows(3)})
    gradient = torch.arange(32.0)
    kept = [0, 5, 10, 15 + 6, 15 + 7, *range(23, 29)]
    assert shards.norm([gradient]) == pytest.approx(sum(i * i for i in kept) ** 0.5)
    assert torch.equal(shards.gradients([gradient])["b"], torch.arange(15.0, 23.0).view(4, 2))


def test_slices_that_are_neighbours_in_a_master_alone_are_read_apart() -> None:
    """At stage 3 a rank has a part of each parameter."""
    values = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    found = []
    for rank in (0, 1):
        shards, offset = shards_of([0, 29, 29], 0, {}), 0
        for name, value in values.items():
            half = value.numel() // 2
            length = value.numel() - half if rank else half
            shards.shard_slices[name] = ShardSlice(0, offset, half * rank, length)
            offset += length
        shards.write(values)
        found.append(shards.read(SHAPES))
    assert all(torch.equal(found[0][name] + found[1][name], value) for name, value in values.items())


def test_parameters_are_read_together_up_to_the_size_of_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 15, 8 and 6 entries, the last two are read by one collective. The tensors share no storage."""
    shards, sizes = shards_of([0, 29], 0, {}), []
    shards.sharded = True
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: sizes.append(tensor.numel()))
    shards.write({name: torch.full(shape, float(len(name) + len(shape))) for name, shape in SHAPES.items()})
    found = shards.read(SHAPES)
    assert sizes == [15, 14] and list(found) == list(SHAPES)
    assert all(tensor.untyped_storage().nbytes() == 4 * tensor.numel() for tensor in found.values())
    assert all(torch.equal(found[name], torch.full(shape, 1.0 + len(shape))) for name, shape in SHAPES.items())


def test_wrong_names_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="a mask for d, which is not a trained parameter"):
        shards_of([0, 29], 0, {"d": rows(0)})
    with pytest.raises(ValueError, match=r"b: shape \(2, 4\); expected \(4, 2\)"):
        shards_of([0, 29], 0, {}).write({"b": torch.zeros(2, 4)})
