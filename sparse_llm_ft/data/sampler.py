"""The order in which samples are consumed: a pure function of seed and position."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

StepIndices = list[list[list[int]]]
"""Of every rank, the sample indices of each micro-batch of one step."""


class SequentialSampler:
    """Sample i at position i: for streamed samples, which arrive in order."""

    def index(self, position: int) -> int:
        """The sample consumed as number `position` (from 0) of the run."""
        return position

    def micro_batches(
        self,
        consumed: int,
        global_batch_size: int,
        micro_batch_size: int,
        world_size: int,
        lengths: Sequence[int] | np.ndarray | None = None,
    ) -> StepIndices:
        """The next optimizer step: of every rank, one list of sample indices per accumulation step.

        Over all ranks and accumulation steps these are exactly the positions ``consumed`` to
        ``consumed + global_batch_size - 1``.

        Args:
            lengths: tokens of every sample. If given, micro-batches group samples of similar length, the longest first.
                That saves padding and keeps the gradient, a mean over the step's samples in any order.

        Raises:
            ValueError: the ranks cannot have equal shares.
        """
        stride = micro_batch_size * world_size
        if global_batch_size % stride:
            raise ValueError(f"global_batch_size {global_batch_size} is not a multiple of {stride}")
        samples = [self.index(position) for position in range(consumed, consumed + global_batch_size)]
        if lengths is not None:
            samples.sort(key=lambda index: -int(lengths[index]))
        firsts = [range(rank * micro_batch_size, global_batch_size, stride) for rank in range(world_size)]
        return [[samples[first : first + micro_batch_size] for first in own] for own in firsts]


class ShuffledSampler(SequentialSampler):
    """An endless sequence of sample indices. Each epoch is shuffled from (seed, epoch).

    A run's position in its data is one integer: the number of samples consumed. World size, micro-batch and
    accumulation do not change the order, so every step consumes the same samples whatever they are.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError("there are no samples")
        self.size = size
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def index(self, position: int) -> int:
        """The sample consumed as number `position` (from 0) of the run."""
        epoch, offset = divmod(position, self.size)
        return int(self._epoch(epoch)[offset])

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.size)
