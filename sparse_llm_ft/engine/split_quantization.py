"""4-bit quantisation of a weight by all processes of a node: each quantises a part and sends it to the others.

bitsandbytes quantises blocks of 64 values, each by itself, to a scale and 32 bytes. Double quantisation then quantises
the scales less their mean, which needs all of them: a 64th of the weight's values. So a weight is divided among the
processes, in rounds:

    values   | rank 0 | rank 1 | rank 0 | rank 1 | rest
    round    |        0        |        1        |  2

The processes exchange codes and scales of every round, and each does the second quantisation. The result is bit by bit
what bitsandbytes makes of the weight. What a process does not quantise it does not read: from the node's reader it gets
its own slices alone (shared_files.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

ALIGNMENT = 256
"""Values of a slice are a multiple of it, and so of the block's size, which is 64 unless someone sets another."""
CPU_VALUES = 2**20
"""Values that are quantised at a time on a CPU, where bitsandbytes uses 14 bytes for each."""


@dataclass(frozen=True)
class Division:
    """Of a flat tensor of `total` values, each of `ranks` processes has `size` values in every round."""

    total: int
    ranks: int
    size: int

    @property
    def rounds(self) -> int:
        """How many rounds there are; in the last one some slices may be short or empty."""
        return -(-self.total // (self.ranks * self.size))

    def slice_of(self, turn: int, rank: int) -> slice:
        """The values of one process in one round."""
        start = (turn * self.ranks + rank) * self.size
        return slice(min(start, self.total), min(start + self.size, self.total))

    def round(self, turn: int) -> slice:
        """The values of one round."""
        start = turn * self.ranks * self.size
        return slice(start, min(start + self.ranks * self.size, self.total))


def divide(total: int, ranks: int, most: int) -> Division:
    """Divide `total` values among `ranks` processes, in rounds of about `most` values or fewer."""
    share, limit = -(-total // ranks), most // ranks
    size = min(-(-share // ALIGNMENT), max(1, limit // ALIGNMENT)) * ALIGNMENT
    return Division(total, ranks, max(size, ALIGNMENT))


class SplitQuantizer:
    """Takes the place of bitsandbytes' `quantize_4bit` while a base is loaded.

    Args:
        ranks, rank: of the node's processes, and this one's number among them.
        exchange: collective of the node's processes. Gets a tensor of bytes, and returns all of theirs, (ranks, bytes).
        round_values: most values of a round.
    """

    def __init__(
        self, ranks: int, rank: int, exchange: Callable[[torch.Tensor], torch.Tensor], round_values: int
    ) -> None:
        self.ranks, self.rank, self._exchange, self._round_values = ranks, rank, exchange, round_values

    def division(self, total: int) -> Division:
        """The division of a tensor with `total` values."""
        return divide(total, self.ranks, self._round_values)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """A context in which transformers quantises with this object."""
        self._quantize = bitsandbytes.functional.quantize_4bit
        with mock.patch.object(bitsandbytes.functional, "quantize_4bit", self):
            yield

    def __call__(
        self,
        values: torch.Tensor,
        blocksize: int,
        compress_statistics: bool,
        quant_type: str,
        quant_storage: torch.dtype,
    ) -> tuple[torch.Tensor, QuantState]:
        """Collective of the node's processes. The bits of `quantize_4bit`, of which each process uses its slices alone.

        Returns:
            The codes, (n, 1) of type `quant_storage`, and the state with the scales.
        """
        if ALIGNMENT % blocksize:
            raise ValueError(f"blocks of {blocksize} values do not divide {ALIGNMENT}")
        flat, division = values.view(-1), self.division(values.numel())
        codes = torch.empty(-(-len(flat) // 2), dtype=torch.uint8, device=values.device)
        scales = torch.empty(-(-len(flat) // blocksize), dtype=torch.float32, device=values.device)
        for turn in range(division.rounds):
            own = self._quantize_part(flat[division.slice_of(turn, self.rank)], division.size, blocksize, quant_type)
            place = division.round(turn)
            for target, part, values_each in ((codes, own[0], 2), (scales, own[1], blocksize)):
                gathered = self._exchange(part.view(torch.uint8)).view(-1).view(part.dtype)
                ours = target[place.start // values_each : -(-place.stop // values_each)]
                ours.copy_(gathered[: len(ours)])
        state = QuantState(
            absmax=scales,
            shape=values.shape,
            dtype=values.dtype,
            blocksize=blocksize,
            code=get_4bit_type(quant_type, device=values.device),
            quant_type=quant_type,
        )
        if compress_statistics:
            state.offset, state.nested = scales.mean(), True
            state.absmax, state.state2 = quantize_blockwise(scales - state.offset, blocksize=256)
        return codes.view(quant_storage).unsqueeze(1), state

    def _quantize_part(
        self, part: torch.Tensor, size: int, blocksize: int, quant_type: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The part's codes, (size / 2) bytes, and its scales, (size / blocksize) float32; zeros follow a short part."""
        codes = torch.zeros(size // 2, dtype=torch.uint8, device=part.device)
        scales = torch.zeros(size // blocksize, dtype=torch.float32, device=part.device)
        step = CPU_VALUES if part.device.type == "cpu" else size
        with mock.patch.object(torch, "bucketize", _count_smaller):
            for start in range(0, len(part), step):
                packed, state = self._quantize(
                    part[start : start + step],
                    blocksize=blocksize,
                    compress_statistics=False,
                    quant_type=quant_type,
                    quant_storage=torch.uint8,
                )
                codes[start // 2 :][: len(packed)] = packed.view(-1)
                scales[start // blocksize :][: len(state.absmax)] = state.absmax
        return codes, scales


def _count_smaller(values: torch.Tensor, bounds: torch.Tensor, out_int32: bool = False) -> torch.Tensor:
    """`torch.bucketize` for few bounds: for each value the number of smaller bounds, and all of them for NaN.

    On a CPU a search for each value takes several times as long as comparing all values with each of 15 bounds.
    """
    not_smaller = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    mask = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    for bound in bounds.tolist():
        torch.le(values, bound, out=mask)
        not_smaller += mask.view(torch.uint8)
    return len(bounds) - not_smaller.to(torch.int32 if out_int32 else torch.int64)
