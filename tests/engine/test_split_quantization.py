"""Quantising a weight in parts: the parts are all of it, and the result has bitsandbytes' own bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from bitsandbytes.functional import QuantState, quantize_4bit

from sparse_llm_ft.engine.shared_files import ShardLayout
from sparse_llm_ft.engine.split_quantization import SplitQuantizer, _count_smaller, divide

OPTIONS = {"blocksize": 64, "compress_statistics": True, "quant_storage": torch.bfloat16}


@pytest.mark.parametrize("total", [1, 255, 256, 257, 3000, 12 * 256])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("most", [100, 1000, 2000, 10**6])
def test_a_division_has_every_value_once_and_its_rounds_in_order(total: int, ranks: int, most: int) -> None:
    division = divide(total, ranks, most)
    slices = [division.slice_of(turn, rank) for turn in range(division.rounds) for rank in range(ranks)]
    assert [i for part in slices for i in range(total)[part]] == list(range(total))
    assert all(part.start % 64 == 0 or part.start == total for part in slices)
    assert division.size <= max(256, most // ranks) and division.size % 256 == 0
    rounds = [i for turn in range(division.rounds) for i in range(total)[division.round(turn)]]
    assert rounds == list(range(total))


@pytest.mark.parametrize("total", [1, 7, 64, 1001])
@pytest.mark.parametrize("size", [1, 10, 1000])
def test_every_process_gets_its_shard_and_no_more(total: int, size: int) -> None:
    shard = -(-total // 5)
    layout = ShardLayout(total, shard, (1, 4), size)  # this node's ranks of five
    for rank, owner in enumerate(layout.owners):
        parts = [layout.slice_of(turn, rank) for turn in range(layout.rounds)]
        values = [i for part in parts for i in range(total)[part]]
        assert values == list(range(total))[owner * shard : (owner + 1) * shard]
        assert all(0 <= part.start <= part.stop <= total and part.stop - part.start <= size for part in parts)


def quantised_by(ranks: int, rank: int, weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, QuantState]:
    """What process `rank` of `ranks` gets, which knows no values but those of its own slices."""
    calls = itertools.count()

    def exchange(own: torch.Tensor) -> torch.Tensor:
        turn, is_scales = divmod(next(calls), 2)  # codes and scales in turn
        parts = [
            quantizer._quantize_part(weight.view(-1)[division.slice_of(turn, other)], division.size, 64, kind)
            for other in range(ranks)
        ]
        sent = [part[is_scales].view(torch.uint8) for part in parts]
        assert torch.equal(own, sent[rank])
        return torch.stack(sent)

    quantizer = SplitQuantizer(ranks, rank, exchange, 2048)
    division = quantizer.division(weight.numel())
    known = torch.full_like(weight, torch.nan).view(-1)
    for turn in range(division.rounds):
        place = division.slice_of(turn, rank)
        known[place] = weight.view(-1)[place]
    with quantizer.installed():
        return quantizer(known.view(weight.shape), quant_type=kind, **OPTIONS)


@pytest.mark.parametrize("shape", [(8, 64), (40, 96), (61, 128)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_process_gets_bitsandbytes_bits(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[3] = 0.0
    expected, state = quantize_4bit(weight, quant_type=kind, **OPTIONS)
    for ranks in (1, 2, 3):
        for rank in range(ranks):
            codes, own_state = quantised_by(ranks, rank, weight, kind)
            assert codes.shape == expected.shape and codes.dtype == expected.dtype
            assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
            ours, theirs = own_state.as_dict(packed=True), state.as_dict(packed=True)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), (ranks, rank)


def test_counting_smaller_bounds_is_bucketize() -> None:
    bounds = torch.randn(15, generator=torch.Generator().manual_seed(2)).sort().values
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0])
    values = torch.cat([torch.randn(5000, generator=torch.Generator().manual_seed(3)), bounds, special])
    for narrow in (True, False):
        expected = torch.bucketize(values, bounds, out_int32=narrow)
        found = _count_smaller(values, bounds, out_int32=narrow)
        assert found.dtype == expected.dtype and torch.equal(found, expected)
