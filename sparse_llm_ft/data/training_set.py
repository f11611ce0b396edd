"""The training split as the loop consumes it: single samples, packs, or a stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sparse_llm_ft.config import TaskConfig
from sparse_llm_ft.data.cache import CachedDataset, DatasetSubset
from sparse_llm_ft.data.packing import PackedDataset
from sparse_llm_ft.data.streaming import StreamingDataset
from sparse_llm_ft.data.subset import LEAST, default_size, halves, stratified
from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.phase import Phase, Subset


@dataclass(frozen=True)
class TrainingSet:
    """The training samples, and the sequences that the loop batches."""

    samples: CachedDataset | StreamingDataset
    task: Task
    settings: TaskConfig

    def subset(self, subset: Subset | None) -> Sequence[Any]:
        """A phase's samples, unpacked: all of them, or a stratified subset."""
        if isinstance(self.samples, StreamingDataset):
            assert subset is None, "the configuration refuses streaming for methods that draw a subset"
            return self.samples  # type: ignore[return-value]
        if subset is None:
            return self.samples
        strata, fraction, shots = self.strata, subset.fraction, subset.shots
        if fraction is None and shots is None:
            least = LEAST if subset.part == "all" else 2 * LEAST  # one half is scored
            fraction, shots = default_size(strata, self.task.few_shot_fraction, least)
        chosen = stratified(strata, fraction=fraction, shots=shots, seed=subset.seed)
        if subset.part != "all":
            chosen = halves(strata, chosen)[subset.part == "other_half"]
        return DatasetSubset(self.samples, chosen)

    def with_steps(self, phase: Phase) -> Phase:
        """The phase with `steps` computed from its `epochs`."""
        if phase.epochs is None:
            return phase
        samples = round(phase.epochs * len(self.sequences(phase.subset)), 9)  # 0.07 * 100 is a little more than 7
        return replace(phase, steps=max(1, math.ceil(samples / phase.global_batch_size)))

    @property
    def strata(self) -> list[int | None]:
        """(samples,), the class of each sample; without classes, None for all."""
        assert isinstance(self.samples, CachedDataset)
        return self.samples.labels if self.task.labels is not None else [None] * len(self.samples)

    def sequences(self, subset: Subset | None = None) -> Any:
        """The sequences of a phase: its samples, or packs of them under ``task.packing``."""
        return self._all if subset is None else self._packed(self.subset(subset))

    @property
    def size(self) -> int:
        """Number of sequences; 0 for a stream, whose length is unknown."""
        return 0 if isinstance(self.samples, StreamingDataset) else len(self._all)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        if isinstance(self.samples, StreamingDataset):
            return self.samples.longest
        return int(self._all.lengths.max())

    def describe(self) -> str:
        """Text for logs, e.g. ``500 training samples in 120 sequences``."""
        if isinstance(self.samples, StreamingDataset):
            return "streamed training samples"
        count = f"{len(self.samples)} training samples"
        return f"{count} in {self.size} sequences" if self.settings.packing else count

    @cached_property
    def _all(self) -> Any:
        return self.samples if isinstance(self.samples, StreamingDataset) else self._packed(self.samples)

    def _packed(self, samples: Any) -> Any:
        return PackedDataset(samples, samples.lengths, self.settings.max_length) if self.settings.packing else samples
