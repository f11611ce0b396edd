"""The training loop of one phase: optimizer steps until the phase or the run ends."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sparse_llm_ft.adapters import tuner_of
from sparse_llm_ft.checkpoint.state import Progress
from sparse_llm_ft.data.sampler import SequentialSampler, ShuffledSampler
from sparse_llm_ft.data.streaming import StreamingDataset
from sparse_llm_ft.distributed import signals
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.errors import TrainingError, UserError
from sparse_llm_ft.model.buffers import KeptBuffers
from sparse_llm_ft.objectives.base import Objective, lengths_of
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.training.callbacks import Callback
from sparse_llm_ft.training.schedule import Schedule


@dataclass
class Step:
    """The numbers of one optimizer step for metrics.jsonl. A `skipped` step changed no parameter."""

    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    active_adapters: int
    skipped: bool = False
    callback: dict[str, object] = field(default_factory=dict)


@dataclass
class Loop:
    """Trains one phase on one engine.

    Args:
        callback: acts on parameters after each step.
        samples: the training set, the same on every rank, or its stream.
        progress: where the run is; every step advances it.
        max_skipped_updates: see `TrainingConfig`.

    Attributes:
        preempted_by: the signal that asked any rank to stop, during the last step or before.
    """

    engine: Engine
    phase: Phase
    callback: Callback | None
    samples: Sequence[Any] | StreamingDataset
    objective: Objective[Any]
    schedule: Schedule
    progress: Progress
    world: World
    seed: int
    max_skipped_updates: int

    def __post_init__(self) -> None:
        self.sampler: SequentialSampler = SequentialSampler()
        self.lengths: np.ndarray | None = None
        if not isinstance(self.samples, StreamingDataset):
            self.sampler = ShuffledSampler(len(self.samples), self.seed)
            self.lengths = lengths_of(self.samples, self.objective)
        self.device = next(self.engine.module.parameters()).device
        self.tuner = tuner_of(self.phase.plan)
        self.active = self._count_active()
        self.preempted_by: str | None = None
        self._skipped = 0  # in a row
        self._buffers = KeptBuffers(self.engine.module)

    def steps(self) -> Iterator[Step]:
        """Collective. Train; yields after each optimizer step, with `progress` already advanced.

        Raises:
            TrainingError: more than `max_skipped_updates` updates in a row were not finite.
        """
        self.engine.module.train()
        while not self.over():
            yield self._step()

    def over(self) -> bool:
        """Whether the phase or the run has no step left."""
        done = self.phase.steps is not None and self.progress.phase_updates >= self.phase.steps
        return done or self.schedule.finished(self.progress)

    def _step(self) -> Step:
        """Collective. One optimizer step over the global batch."""
        started = time.perf_counter()
        progress, phase, world = self.progress, self.phase, self.world
        self._seed_generators()
        # This rank's micro-batches, and the loss units of the global batch.
        indices = list(
            self.sampler.micro_batches(
                progress.position,
                phase.global_batch_size,
                phase.micro_batch_size,
                world.rank,
                world.size,
                self.lengths,
            )
        )
        micro_batches, units, tokens = self._read_samples(indices)
        # DeepSpeed averages over ranks and accumulation steps. This factor turns the average of sums into the mean over
        # all units of the global batch, so that it does not matter which rank got the long completions.
        factor = len(indices) * world.size / units
        learning_rate = self.schedule.learning_rate(progress) * phase.lr_factor

        # Accumulate gradients over the micro-batches; the engine updates at the last one.
        total, updated = torch.zeros((), device=self.device), False
        gradients: dict[str, torch.Tensor] = {}
        for i, samples in enumerate(micro_batches):
            batch = self.objective.batch(samples)
            loss = self.objective.loss(self.engine.forward, {k: v.to(self.device) for k, v in batch.items()})
            total += loss.detach()
            # A loss that is not finite can have finite gradients, and the engine would not skip the update.
            factors = torch.where(torch.isfinite(loss.detach()), factor, torch.nan)
            self.engine.backward(loss * factors + self.tuner.penalty(phase.plan, self.engine.parameters))
            if self.callback is not None and self.callback.needs_gradients and i == len(indices) - 1:
                gradients = self.engine.gradients()
            updated = self.engine.step(learning_rate)

        self._buffers.restore()

        # Agree on the loss, count the step, and run the callback on an update that was made.
        mean_loss = self._sum_loss(total) / units
        skipped = not (updated and math.isfinite(mean_loss))
        self._count_skipped(skipped, mean_loss)
        progress.step += 1
        progress.phase_step += 1
        progress.phase_skipped += skipped
        progress.samples += phase.global_batch_size
        logged = {} if skipped else self._run_callback(gradients)
        seconds = time.perf_counter() - started
        return Step(mean_loss, learning_rate, self.engine.grad_norm, tokens, seconds, self.active, skipped, logged)

    def _sum_loss(self, loss: torch.Tensor) -> float:
        """Collective. The loss summed over ranks. The flags of their signals go along, so agreeing on them is free."""
        shared = torch.cat([loss.reshape(1), torch.tensor(signals.caught(), dtype=loss.dtype, device=self.device)])
        dist.all_reduce(shared)
        total, *flags = shared.tolist()
        self.preempted_by = signals.preempted_by(flags)
        return total

    def _count_skipped(self, skipped: bool, loss: float) -> None:
        """Raise TrainingError after too many skipped updates in a row."""
        self._skipped = self._skipped + 1 if skipped else 0
        if self._skipped > self.max_skipped_updates:
            raise TrainingError(
                f"step {self.progress.step + 1} has loss {loss} and gradient norm {self.engine.grad_norm}"
                f"{f', after {self._skipped - 1} skipped updates in a row' if self._skipped > 1 else ''}; lower "
                "training.learning_rate; the last checkpoint is intact"
            )

    def _run_callback(self, gradients: dict[str, torch.Tensor]) -> dict[str, object]:
        """Collective. Run the callback; returns what it logs."""
        if self.callback is None:
            return {}
        if gradients:  # those of the update: clipped
            clipped = self.engine.clip_factor
            gradients = {name: gradient * clipped for name, gradient in gradients.items()}
        logged = self.callback.after_step(self.engine, self.progress.phase_updates, gradients)
        self.active = self._count_active()
        return logged

    def _count_active(self) -> int:
        """Collective. How many adapters change the output."""
        return len(self.phase.plan.active) if self.callback is None else self.callback.active_adapters(self.engine)

    def _read_samples(self, micro_batches: list[list[int]]) -> tuple[list[list[Any]], int, int]:
        """Collective. This rank's samples by micro-batch; loss units and tokens of the global batch.

        Raises:
            UserError: the same on every rank, if the stream gives one of them a row that cannot be used.
        """
        chosen: list[list[Any]] = []
        failed = False
        try:
            chosen = [[self.samples[k] for k in indices] for indices in micro_batches]
        except UserError:
            failed = True
        own = [sample for samples in chosen for sample in samples]
        counts = [sum(map(self.objective.units, own)), sum(map(self.objective.tokens, own)), failed]
        shared = torch.tensor(counts, device=self.device)
        dist.all_reduce(shared)
        units, tokens, failures = shared.tolist()
        if failures:  # every rank reads the whole global batch, and so finds the row that failed
            first = self.progress.position
            for position in range(first, first + self.phase.global_batch_size):
                self.samples[self.sampler.index(position)]
            raise TrainingError("a training sample could be read by some processes, not by all")
        return chosen, units, tokens

    def _seed_generators(self) -> None:
        """Make dropout a function of (seed, samples consumed, rank): a resumed run draws what the first one drew."""
        mixed = np.random.SeedSequence([self.seed, self.progress.samples, self.world.rank])
        torch.manual_seed(int(mixed.generate_state(1)[0]))
