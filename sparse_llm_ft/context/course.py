"""The course of a run before it starts: its samples, how long it is, its methods, and its first phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from sparse_llm_ft.config import RunConfig, check_steps
from sparse_llm_ft.context.preflight import Prepared
from sparse_llm_ft.context.setup import Setup
from sparse_llm_ft.data.cache import DatasetSubset
from sparse_llm_ft.data.dataset import Splits, packed, strata
from sparse_llm_ft.data.streaming import StreamingDataset
from sparse_llm_ft.data.subset import stratified
from sparse_llm_ft.distributed.collectives import encoding_together
from sparse_llm_ft.methods.chain import Chain, build_methods
from sparse_llm_ft.objectives.base import lengths_of
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.training.batch_size import first_batch
from sparse_llm_ft.training.schedule import Schedule


@dataclass(frozen=True)
class Course:
    """What follows from settings, architecture and data together.

    Attributes:
        first: the phase that the run begins with.
        train: what the loop goes through: samples, packs of them, or a stream.
    """

    config: RunConfig
    setup: Setup
    samples: Splits
    train: Any
    schedule: Schedule
    methods: Chain
    first: Phase

    @classmethod
    def of(cls, prepared: Prepared, setup: Setup) -> Course:
        """Encode the data, or find them in the cache. Collective, once processes are connected.

        Raises:
            UserError: rows that cannot be used; settings that do not fit the run's length.
        """
        config = prepared.config
        connected = dist.is_initialized()
        together = encoding_together(prepared.world) if connected else {}
        samples = Splits.encode(config, prepared.task, setup.tokenizer, setup.task_mode, **together)
        train: Any = samples.train
        if not isinstance(train, StreamingDataset):
            train = packed(train, lengths_of(train, setup.objective), config)
        schedule = Schedule(config.training, 0 if isinstance(train, StreamingDataset) else len(train))
        check_steps(config, schedule.total_steps)
        methods = build_methods(config, schedule.total_steps)
        first = first_batch(methods.first(setup.plan, setup.targets), config)
        return cls(config, setup, samples, train, schedule, methods, first)

    def samples_of(self, phase: Phase) -> Sequence[Any]:
        """The training samples that the phase uses, one by one."""
        train, subset = self.samples.train, phase.subset
        if subset is None or isinstance(train, StreamingDataset):
            assert subset is None, "check_streaming made sure"
            return train  # type: ignore[return-value]
        labels = strata(train, self.setup.task)
        chosen = stratified(labels, fraction=subset.fraction, shots=subset.shots, seed=subset.seed)
        return DatasetSubset(train, chosen)

    def units(self, phase: Phase) -> Any:
        """What the loop goes through in the phase: `samples_of`, packed where the settings say so."""
        if phase.subset is None:
            return self.train
        samples = self.samples_of(phase)
        return packed(samples, lengths_of(samples, self.setup.objective), self.config)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample or pack."""
        if isinstance(self.train, StreamingDataset):
            return self.train.longest
        return int(lengths_of(self.train, self.setup.objective).max())

    def describe(self) -> str:
        """``500 training samples in 120 sequences``."""
        if isinstance(self.train, StreamingDataset):
            return "training samples as they are streamed"
        count = f"{len(self.samples.train)} training samples"  # type: ignore[arg-type]
        return f"{count} in {len(self.train)} sequences" if self.config.task.packing else count
