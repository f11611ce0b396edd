"""The training loop of one phase: optimizer steps until the phase or the run ends.

On a GPU the host runs ahead of it by up to one step: loss, gradient norm and the decision to skip an update stay on the
device, and the host reads them when the next step is on its way. It reads them at once where what follows needs them:
before a save or a validation, at the phase's end, where a callback may change parameters, and on a CPU, where reading
is free.

With a `guard`, a rank that runs out of memory makes the step's collectives all the same, and the all-reduce of the loss
tells the others. No rank makes that update, nor one that the host has begun meanwhile; the loop ends, with the progress
and the engine as they were before the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from sparse_llm_ft.adapters import tuner_of
from sparse_llm_ft.checkpoint.state import Progress, Tensors
from sparse_llm_ft.data.collate import Batch
from sparse_llm_ft.data.sampler import SequentialSampler, ShuffledSampler
from sparse_llm_ft.data.streaming import StreamingDataset
from sparse_llm_ft.distributed import signals
from sparse_llm_ft.distributed.collectives import run_on_every_rank, run_on_rank_zero
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.engine.host_read import HostRead, on_device
from sparse_llm_ft.engine.memory_guard import MemoryGuard
from sparse_llm_ft.errors import DivergedError
from sparse_llm_ft.model.buffers import KeptBuffers
from sparse_llm_ft.objectives.base import Forward, Objective, lengths_of
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.training.batches import BatchThread, Share, ShareMaker
from sparse_llm_ft.training.callbacks import Callback
from sparse_llm_ft.training.schedule import Schedule

if TYPE_CHECKING:
    from sparse_llm_ft.training.prefix_cache import LossOf, PrefixCache


@dataclass
class Step:
    """The numbers of one optimizer step for metrics.jsonl. A `skipped` step changed no parameter.

    Attributes:
        tokens: of the global batch, without padding.
        squares: sum of its samples' squared lengths.
        units: loss units of the global batch.
        seconds: in the loop since the step before, without what the loop's user does between.
        cached_samples: those of the global batch whose lower layers were not run; None: there is no cache.
    """

    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    active_adapters: int
    skipped: bool = False
    callback: dict[str, object] = field(default_factory=dict)
    units: int = 0
    squares: int = 0
    cached_samples: int | None = None


@dataclass(frozen=True)
class _Made:
    """A step that the device has been given, before its values are known.

    Attributes:
        after: the progress after it, if its update is made.
        values: loss summed over ranks, how many of them ran out of memory, how many have a `Loop.failure`, gradient
            norm, and how many have received each signal.
        read: what a callback reads, as the update has left it.
        gradients: of the update, where a callback needs them.
    """

    after: Progress
    learning_rate: float
    units: int
    tokens: int
    squares: int
    values: HostRead
    read: Callable[[], Tensors]
    gradients: Tensors
    cached_samples: int | None


class _UnusableShare(Exception):
    """Some rank has a row that cannot be used or read. Raised on every rank, with its own share."""

    def __init__(self, share: Share) -> None:
        super().__init__()
        self.share = share


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
        runs_ahead: whether a step's values may be read after the next one has begun.
        prefix: computes losses with cached states, if set.
        guard: catches it when memory does not suffice, if set; beside it there is no `prefix`.
        out_of_memory: whether the loop has ended because it did not, on any rank.
        failure: an error of rank 0 in what follows a step. The next step's all-reduce tells the other ranks, and all
            stop: a collective of its own would make the host wait for the GPU after every step.
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
        self.runs_ahead = self.device.type == "cuda"
        self.tuner = tuner_of(self.phase.plan)
        self.active = self._count_active()
        self.preempted_by: str | None = None
        self._make = ShareMaker(
            self.samples, self.sampler, self.lengths, self.objective, self.phase, self.world, self.device
        )
        self._asked: str | None = None  # the signal, before the engine is where the run can stop
        self.prefix: PrefixCache | None = None
        self.guard: MemoryGuard | None = None
        self.out_of_memory = False
        self.failure: Exception | None = None
        self._skipped = 0  # in a row
        self._shares: dict[int, tuple[Share, HostRead]] = {}  # by the samples consumed before
        self._buffers = KeptBuffers(self.engine.module)

    def steps(self, at_once: Callable[[Progress], bool] = lambda _: True) -> Generator[Step]:
        """Collective. Train; yields after each optimizer step, with `progress` already advanced.

        Args:
            at_once: whether the caller needs the engine as the step left it that ends at this progress (it saves, or
                validates). Of other steps it gets the numbers, perhaps when the next one has been made too.

        Raises:
            UserError, TrainingError: on every rank, if the stream gives one of them a row that cannot be used or read,
                or for a `failure`.
            DivergedError: more than `max_skipped_updates` updates in a row were not finite.
        """
        self.engine.module.train()
        thread = BatchThread(self._make, self._certain)
        waiting: list[_Made] = []
        began = time.perf_counter()
        try:
            while not self.over():
                at, unusable = waiting[-1].after if waiting else self.progress, None
                try:
                    waiting.append(self._step(at, thread))
                except _UnusableShare as found:  # on every rank; the step before it is made, and its caller hears of it
                    unusable = found.share
                while waiting:
                    last = waiting[-1]
                    may_wait = unusable is None and len(waiting) == 1 and self._may_wait(last.after)
                    if may_wait and not at_once(last.after):
                        break
                    step = self._finish(waiting.pop(0), not waiting)
                    if step is None:
                        return
                    step.seconds = time.perf_counter() - began
                    yield step
                    began = time.perf_counter()
                if unusable is not None:
                    self._end_together(unusable)
        finally:
            thread.close()
            if self.prefix is not None:
                self.prefix.close()
            self._shares.clear()

    def raise_failure(self) -> None:
        """Raise `failure`, if there is one."""
        if self.failure is not None:
            raise self.failure

    def over(self) -> bool:
        """Whether the phase or the run has no step left."""
        return self._over(self.progress)

    def _over(self, progress: Progress) -> bool:
        done = self.phase.steps is not None and progress.phase_updates >= self.phase.steps
        return done or self.schedule.finished(progress)

    def _after(self, progress: Progress) -> Progress:
        """The progress after one more step whose update is made."""
        samples = progress.samples + self.phase.global_batch_size
        return replace(progress, step=progress.step + 1, phase_step=progress.phase_step + 1, samples=samples)

    def _certain(self, progress: Progress) -> Iterator[Progress]:
        """`progress`, where a step begins, and that of each later step; skipped updates can only make them more."""
        yield progress
        while not self._over(progress := self._after(progress)):
            yield progress

    def _step(self, progress: Progress, thread: BatchThread) -> _Made:
        """Collective. One optimizer step over the global batch, of which no value is read from the device."""
        phase, world = self.phase, self.world
        share, units, tokens, squares = self._share(progress, thread)
        self._seed_generators(progress)
        loss_of: LossOf = self.objective.loss
        if self.prefix is not None:
            following = self._shares.get(self._after(progress).samples)
            loss_of = self.prefix.losses(share.indices, following[0].indices if following else [])
        # DeepSpeed averages over ranks and accumulation steps. This factor turns the average of sums into the mean over
        # all units of the global batch, so that it does not matter which rank got the long completions.
        factor = len(share.batches) * world.size / units
        learning_rate = self.schedule.learning_rate(progress) * phase.lr_factor

        # Accumulate gradients over the micro-batches; the engine updates at the last one.
        total = torch.zeros((), device=self.device)
        gradients: Tensors = {}
        for i, batch in enumerate(share.batches):
            losses = partial(self._losses, loss_of, batch, factor)
            if self.guard is None:
                loss, differentiated = losses(self.engine.forward)
                self.engine.backward(differentiated)
            else:
                loss = self.guard.backward(losses)
            total += loss
            if self.callback is not None and self.callback.needs_gradients and i == len(share.batches) - 1:
                gradients = self.engine.gradients()
            self.engine.step(learning_rate)

        self._buffers.restore()
        values = HostRead(self._sum_loss(total))
        read = dict if self.callback is None else self.engine.begin_read(self.callback.reads)
        cached = None if self.prefix is None else self.prefix.served
        return _Made(self._after(progress), learning_rate, units, tokens, squares, values, read, gradients, cached)

    def _losses(
        self, loss_of: LossOf, batch: Batch, factor: float, forward: Forward
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Collective, as `forward` is. A micro-batch's loss, detached, and what is differentiated: two scalars."""
        moved = {name: t.to(self.device, non_blocking=True) if t.ndim else t for name, t in batch.items()}
        loss = loss_of(forward, moved)
        # A loss that is not finite can have finite gradients, and the engine would not skip the update.
        factors = torch.where(torch.isfinite(loss.detach()), factor, torch.nan)
        return loss.detach(), loss * factors + self.tuner.penalty(self.phase.plan, self.engine.parameters)

    def _share(self, progress: Progress, thread: BatchThread) -> tuple[Share, int, int, int]:
        """Collective. This rank's share of the step that begins at `progress`; units, tokens and squared lengths of the
        global batch. The ranks sum these of the next step too, so that nobody waits for that sum when it begins.

        Raises:
            _UnusableShare: on every rank, if one of them has a row that cannot be used or read.
        """
        for _, at in zip(range(2), self._certain(progress), strict=False):
            if at.samples not in self._shares:
                share = thread.take(at)
                self._shares[at.samples] = share, self._sum_counts(share)
        share, counts = self._shares.pop(progress.samples)
        units, tokens, squares, failures = map(int, counts.numbers())
        if failures:
            thread.close()
            raise _UnusableShare(share)
        return share, units, tokens, squares

    def _end_together(self, share: Share) -> NoReturn:
        """Collective. Raise the error of this rank's share, or of the first rank that has one."""

        def fail() -> None:
            if share.error is not None:
                raise share.error

        if self.world.size > 1:
            run_on_every_rank(fail)
        fail()
        raise AssertionError("the ranks counted a failure")

    def _sum_counts(self, share: Share) -> HostRead:
        """Collective. A share's counts, summed over ranks."""
        counts = [share.units, share.tokens, share.squares, int(share.error is not None)]
        if self.world.size == 1:
            return HostRead(torch.tensor(counts))
        shared = on_device(counts, self.device)
        dist.all_reduce(shared)
        return HostRead(shared)

    def _sum_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Collective. (4 + signals,) float64: see `_Made.values`. The flags go along, so agreeing on them is free."""
        failed = self.guard is not None and self.guard.failed
        own = [failed, self.failure is not None, *signals.caught()]
        shared = torch.cat([loss.reshape(1), on_device(own, self.device, loss.dtype)])
        dist.all_reduce(shared)
        norm = torch.as_tensor(self.engine.norm, dtype=torch.float64, device=self.device)
        return torch.cat([shared[:3].double(), norm.reshape(1), shared[3:].double()])

    def _may_wait(self, after: Progress) -> bool:
        """Whether another step is certain to follow, and may begin before the values of this one are known, of which
        alone the host does not know whether its update was made.
        """
        update = after.phase_step - self.progress.phase_skipped
        if self.callback is not None and self.callback.may_change(update):
            return False
        return self.runs_ahead and self._asked is None and not self._over(after)

    def _finish(self, made: _Made, is_last: bool) -> Step | None:
        """Collective. Read a step's values, count it, and run the callback on an update that was made. None: a rank
        ran out of memory, so the step was not made.

        Args:
            is_last: whether the engine is as this step left it; only then may the run stop here.
        """
        loss, failed, failures, norm, *flags = made.values.numbers()
        if failed:
            self.out_of_memory = True
            return None
        if failures:
            run_on_rank_zero(self.world, self.raise_failure)
        mean_loss = loss / made.units
        asked = self._asked = self._asked or signals.preempted_by(flags)
        self.preempted_by = asked if is_last else None
        skipped = not (math.isfinite(norm) and math.isfinite(mean_loss))
        self._count_skipped(skipped, mean_loss, norm, made.after.step)
        skips = self.progress.phase_skipped + skipped
        for name in ("step", "phase_step", "samples"):  # in place: the caller holds this object
            setattr(self.progress, name, getattr(made.after, name))
        self.progress.phase_skipped = skips
        logged = {} if skipped else self._run_callback(made.read, made.gradients)
        return Step(
            mean_loss,
            made.learning_rate,
            norm,
            made.tokens,
            0.0,
            self.active,
            skipped,
            logged,
            made.units,
            made.squares,
            made.cached_samples,
        )

    def _count_skipped(self, skipped: bool, loss: float, norm: float, step: int) -> None:
        """Raise DivergedError after too many skipped updates in a row."""
        self._skipped = self._skipped + 1 if skipped else 0
        if self._skipped > self.max_skipped_updates:
            raise DivergedError(
                f"step {step} has loss {loss} and gradient norm {norm}"
                f"{f', after {self._skipped - 1} skipped updates in a row' if self._skipped > 1 else ''}; lower "
                "training.learning_rate; the last checkpoint is intact"
            )

    def _run_callback(self, read: Callable[[], Tensors], gradients: Tensors) -> dict[str, object]:
        """Collective. Run the callback; returns what it logs."""
        if self.callback is None:
            return {}
        if gradients:  # those of the update: clipped
            clipped = float(self.engine.clip_factor)
            gradients = {name: gradient * clipped for name, gradient in gradients.items()}
        logged = self.callback.after_step(self.engine, self.progress.phase_updates, read(), gradients)
        self.active = self._count_active()
        return logged

    def _count_active(self) -> int:
        """Collective. How many adapters change the output."""
        return len(self.phase.plan.active) if self.callback is None else self.callback.active_adapters(self.engine)

    def _seed_generators(self, progress: Progress) -> None:
        """Make dropout a function of (seed, samples consumed, rank): a resumed run draws what the first one drew."""
        mixed = np.random.SeedSequence([self.seed, progress.samples, self.world.rank])
        torch.manual_seed(int(mixed.generate_state(1)[0]))
