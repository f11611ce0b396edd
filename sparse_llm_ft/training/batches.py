"""The batches of the next steps, made in a thread while a step runs.

One thread reads and collates, in the order of the steps and never beyond the last one, so a stream is read as far as
without it. Data sets need no lock: the loop reads its samples nowhere else while the thread lives, and what others read
meanwhile (validation) is another object. What ranks must agree on, errors included, stays with the main thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sparse_llm_ft.checkpoint.state import Progress
from sparse_llm_ft.data.collate import Batch
from sparse_llm_ft.data.sampler import SequentialSampler, StepIndices
from sparse_llm_ft.data.samples import Pack
from sparse_llm_ft.data.streaming import StreamingDataset
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import TrainingError, UserError
from sparse_llm_ft.objectives.base import Objective
from sparse_llm_ft.phase import Phase

AHEAD = 2
"""How many steps the thread is ahead of the loop at most."""


@dataclass(frozen=True)
class Share:
    """This rank's part of a step's global batch.

    Attributes:
        batches: of each micro-step, on the CPU; pinned if a GPU will read them.
        units, tokens: loss units, and tokens without padding.
        squares: sum of the squared lengths of all samples, for the arithmetic of attention.
        indices: the samples of the whole step.
        error: why a row cannot be used or read; then the rest is empty.
    """

    batches: tuple[Batch, ...] = ()
    units: int = 0
    tokens: int = 0
    squares: int = 0
    indices: StepIndices = field(default_factory=list)
    error: UserError | TrainingError | None = None


@dataclass(frozen=True)
class ShareMaker:
    """Makes a rank's share of any step.

    Args:
        lengths: see `SequentialSampler.micro_batches`.
        device: where the batches will be used.
    """

    samples: Sequence[Any] | StreamingDataset
    sampler: SequentialSampler
    lengths: np.ndarray | None
    objective: Objective[Any]
    phase: Phase
    world: World
    device: torch.device

    def __call__(self, progress: Progress) -> Share:
        """The share of the step that begins at `progress`."""
        objective = self.objective
        indices = self._indices(progress)
        try:
            micro_batches = self.read(indices[self.world.rank])
        except (UserError, TrainingError) as error:
            return Share(error=error)
        own = [sample for samples in micro_batches for sample in samples]
        return Share(
            tuple(self._pinned(objective.batch(samples)) for samples in micro_batches),
            sum(map(objective.units, own)),
            sum(map(objective.tokens, own)),
            sum(objective.tokens(part) ** 2 for sample in own for part in _parts(sample)),
            indices,
        )

    def read(self, indices: Sequence[Sequence[int]]) -> list[list[Any]]:
        """The samples of these numbers, by micro-batch.

        Raises:
            UserError: a row cannot be used.
            TrainingError: the hub is away.
        """
        return [[self.samples[k] for k in own] for own in indices]

    def _indices(self, progress: Progress) -> StepIndices:
        total, micro = self.phase.global_batch_size, self.phase.micro_batch_size
        return self.sampler.micro_batches(progress.position, total, micro, self.world.size, self.lengths)

    def _pinned(self, batch: Batch) -> Batch:
        if self.device.type != "cuda":
            return batch
        # Only dense memory can be pinned, and an expanded tensor has none of its own.
        return {name: value.contiguous().pin_memory() for name, value in batch.items()}


def _parts(sample: Any) -> Sequence[Any]:
    """The samples that attention keeps apart."""
    return sample.samples if isinstance(sample, Pack) else (sample,)


class BatchThread:
    """The thread, and the shares that it has made or is making.

    Args:
        following: yields, from a step's progress on, that of each step which is certain to be made.
    """

    def __init__(self, make: ShareMaker, following: Callable[[Progress], Iterator[Progress]]) -> None:
        self._make, self._following = make, following
        self._made: dict[int, Future[Share]] = {}  # by the samples consumed before
        self._thread = ThreadPoolExecutor(1, "batches", initializer=use_device, initargs=(make.device,))

    def take(self, progress: Progress) -> Share:
        """The share of the step that begins at `progress`, which the caller takes once; the next ones are begun.

        Raises:
            Exception: whatever the thread met, but for rows that cannot be used (`Share.error`).
        """
        steps = self._following(progress)
        for _, at in zip(range(1 + AHEAD), steps, strict=False):
            if at.samples not in self._made:
                self._made[at.samples] = self._thread.submit(self._make, at)
        return self._made.pop(progress.samples).result()

    def close(self) -> None:
        """End the thread, after the share that it is making."""
        self._thread.shutdown(cancel_futures=True)
        self._made.clear()


def use_device(device: torch.device) -> None:
    """Called in a new thread that pins memory for `device`."""
    if device.type == "cuda":  # a thread begins with the first GPU, and pinning would take memory there
        torch.cuda.set_device(device)
