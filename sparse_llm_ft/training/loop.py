"""One phase of training: optimizer steps until the phase or the run is over."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sparse_llm_ft.adapters import is_omega
from sparse_llm_ft.data.encoding import Sample, training_batch
from sparse_llm_ft.data.stream import SampleStream
from sparse_llm_ft.distributed import World
from sparse_llm_ft.engine import Engine
from sparse_llm_ft.errors import TrainingError
from sparse_llm_ft.evaluation import completion_loss, takes_logits_to_keep
from sparse_llm_ft.methods import Phase
from sparse_llm_ft.optim import StoIHT
from sparse_llm_ft.progress import Progress
from sparse_llm_ft.training.schedule import Schedule


@dataclass
class Step:
    """What one optimizer step was: the numbers of metrics.jsonl."""

    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    active_adapters: int
    cut: dict[str, Any] = field(default_factory=dict)


@dataclass
class Loop:
    """Steps of one phase on one engine.

    Args:
        samples: the training set, the same on every rank.
        progress: where the run is; moved on by every step.
    """

    engine: Engine
    phase: Phase
    rule: StoIHT | None
    samples: Sequence[Sample]
    pad_token_id: int
    schedule: Schedule
    progress: Progress
    world: World
    seed: int

    def __post_init__(self) -> None:
        self.stream = SampleStream(len(self.samples), self.seed)
        self.keeps_logits = takes_logits_to_keep(self.engine.module)
        self.device = next(self.engine.module.parameters()).device
        self.omegas = [name for name in self.engine.parameters if is_omega(name)]
        self.active = len(self.phase.plan.active) if self.rule is None else self._count_active()

    def steps(self) -> Iterator[Step]:
        """Train; yields after each optimizer step, with `progress` already moved on."""
        self.engine.module.train()
        while not self.over():
            yield self._step()

    def over(self) -> bool:
        """Whether the phase, or with it the run, has no step left."""
        done = self.phase.steps is not None and self.progress.phase_step >= self.phase.steps
        return done or self.schedule.finished(self.progress)

    def _step(self) -> Step:
        started = time.perf_counter()
        progress, phase, world = self.progress, self.phase, self.world
        self._seed_generators()
        shares = list(
            self.stream.micro_batches(
                progress.samples, phase.global_batch_size, phase.micro_batch_size, world.rank, world.size
            )
        )
        supervised, tokens = self._count_global()
        # DeepSpeed averages over ranks and accumulation steps; this factor turns the average of sums into the mean
        # over all supervised tokens of the global batch, so that it does not matter who got the long completions.
        factor = len(shares) * world.size / supervised
        learning_rate = self.schedule.learning_rate(progress) * phase.lr_factor
        total = torch.zeros(1, device=self.device)
        for indices in shares:
            batch = training_batch([self.samples[i] for i in indices], self.pad_token_id)
            loss = completion_loss(
                self.engine.forward, {k: v.to(self.device) for k, v in batch.items()}, self.keeps_logits
            )
            total += loss.detach()
            self.engine.backward(loss * factor)
            self.engine.step(learning_rate)
        dist.all_reduce(total)
        mean_loss = float(total) / supervised
        if not (math.isfinite(mean_loss) and math.isfinite(self.engine.grad_norm)):
            raise TrainingError(
                f"step {progress.step + 1} has loss {mean_loss} and gradient norm {self.engine.grad_norm}; lower "
                "training.learning_rate; the last checkpoint is intact"
            )
        progress.step += 1
        progress.phase_step += 1
        progress.samples += phase.global_batch_size
        cut = self._apply_rule()
        return Step(
            mean_loss, learning_rate, self.engine.grad_norm, tokens, time.perf_counter() - started, self.active, cut
        )

    def _apply_rule(self) -> dict[str, Any]:
        """Cut omega if the phase has a rule and a cut is due."""
        if self.rule is None:
            return {}
        omega = {name: float(value) for name, value in self.engine.values(self.omegas).items()}
        zeroed, swaps = self.rule.after_step(self.progress.phase_step, omega)
        if zeroed:
            self.engine.load({name: torch.tensor([value]) for name, value in zeroed.items()})
        self.active = sum(value > 0 for value in (omega | zeroed).values())
        return {"swaps": swaps} if self.rule.kept else {}

    def _count_active(self) -> int:
        return sum(float(value) > 0 for value in self.engine.values(self.omegas).values())

    def _count_global(self) -> tuple[int, int]:
        """Supervised and all tokens of the global batch; every rank knows every sample, so nothing is sent."""
        first = self.progress.samples
        chosen = [self.samples[self.stream.index(i)] for i in range(first, first + self.phase.global_batch_size)]
        supervised = sum(sample.supervised for sample in chosen)
        return supervised, supervised + sum(len(sample.prompt) for sample in chosen)

    def _seed_generators(self) -> None:
        """Dropout as a function of (seed, samples consumed, rank): a resumed run draws what the first one drew."""
        mixed = np.random.SeedSequence([self.seed, self.progress.samples, self.world.rank])
        torch.manual_seed(int(mixed.generate_state(1)[0]))
