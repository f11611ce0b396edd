"""`PhaseTraining`: one phase on one engine. It runs the loop, does what is due after a step, and reads the state."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from sparse_llm_ft.adapters import count_parameters, is_adapter
from sparse_llm_ft.adapters.masking import to_compact
from sparse_llm_ft.checkpoint.record import PhaseRecord
from sparse_llm_ft.checkpoint.state import Progress, TrainState
from sparse_llm_ft.checkpoint.store import save_checkpoint
from sparse_llm_ft.cluster.state_writer import StateWriter
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.data.dataset import Splits
from sparse_llm_ft.data.training_set import TrainingSet
from sparse_llm_ft.distributed.collectives import broadcast_text, run_on_rank_zero
from sparse_llm_ft.distributed.signals import exit_if_preempted
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.engine.memory_guard import MemoryGuard
from sparse_llm_ft.engine.peak_memory import PeakMemory
from sparse_llm_ft.errors import PreemptionRequested
from sparse_llm_ft.evaluation.loop import mean_loss
from sparse_llm_ft.io.content_cache import content_key
from sparse_llm_ft.io.wait import Wait
from sparse_llm_ft.model.flops import step_flops
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.scoring.cache import hash_model
from sparse_llm_ft.training.best import NOTHING_WATCHED, BestWatch
from sparse_llm_ft.training.callbacks import build_callback
from sparse_llm_ft.training.loop import Loop, Step
from sparse_llm_ft.training.metrics_logger import MetricsLogger
from sparse_llm_ft.training.prefix_cache import open_prefix
from sparse_llm_ft.training.prefix_store import keep_only
from sparse_llm_ft.training.records import cached_share, step_line
from sparse_llm_ft.training.report_writer import ReportWriter
from sparse_llm_ft.training.schedule import Schedule
from sparse_llm_ft.training.trackers import LEAVING_SECONDS, Trackers


@dataclass(frozen=True)
class RunParts:
    """What all phases of a run share.

    Attributes:
        run_state: writes state.json.
        report: draws the run so far after saves.
    """

    context: RunContext
    splits: Splits
    data: TrainingSet
    schedule: Schedule
    run_state: StateWriter
    trackers: Trackers
    report: ReportWriter

    def loop(self, engine: Engine, phase: Phase, state: TrainState) -> Loop:
        """Collective. The phase's loop, continuing from `state`."""
        config = self.context.config
        samples, schedule = self.data.sequences(phase.subset), self.schedule
        if phase.is_warmup:
            schedule = schedule.for_warmup(phase.steps or 0, len(samples), phase.learning_rate)
        return Loop(
            engine,
            phase,
            build_callback(phase, state, engine),
            samples,
            self.context.objective,
            schedule,
            copy.copy(state.progress),
            self.context.world,
            config.seed,
            config.training.max_skipped_updates,
        )

    def save(self, state: TrainState, protect: int | None = None) -> None:
        """Collective. Write the state as a checkpoint.

        Args:
            protect: a step whose checkpoint must stay.
        """
        folder, keep = self.context.folder.checkpoints, self.context.config.training.keep_checkpoints
        with Wait(self.context.console, f"saving step {state.progress.step}"):
            run_on_rank_zero(self.context.world, lambda: save_checkpoint(folder, state, keep, protect))
        self.report.refresh()


class PhaseTraining:
    """Trains a phase to its end, or until memory does not suffice for a step. Every method is a collective.

    Attributes:
        best: the best validation so far.
        loop: `loop.out_of_memory` says whether memory did not suffice.
    """

    def __init__(self, parts: RunParts, engine: Engine, phase: Phase, before: TrainState) -> None:
        self.parts, self.phase, self.before = parts, phase, before
        context = self.context = parts.context
        self.config, self.world, self.console, self.training = (
            context.config,
            context.world,
            context.console,
            context.config.training,
        )
        self.loop = parts.loop(engine, phase, before)
        if self.training.on_oom == "shrink":
            self.loop.guard = MemoryGuard(engine)
        self.loop.prefix = open_prefix(self.loop, self.training, self.console.log, self._states_folder)
        self.record = PhaseRecord.of(
            phase,
            before.record.current,
            self._count_trained(engine),
            engine.optimizer_bytes(),
            engine.weight_bytes(),
        )
        self.memory = PeakMemory(self.loop.device)
        self.best = BestWatch.of(self.training, before.record.best) if phase.open_ended else NOTHING_WATCHED
        self.watcher = context.evaluator(parts.splits.watched)
        tensorboard = "tensorboard" in self.config.trackers
        step = self.loop.progress.step
        self.writer = MetricsLogger(context.folder, self.world.rank, step, parts.trackers, tensorboard)
        self.flops = step_flops(context.empty, phase.plan, self.config.model.dtype, self.loop.device, self.world.size)

    def train(self) -> TrainState:
        """Make the steps. Returns the state after the last one.

        Raises:
            PreemptionRequested: a signal asked the run to stop; the state is saved.
        """
        run_on_rank_zero(self.world, self.writer.open)
        exit_if_preempted()
        self.console.begin(self.phase.name, self.loop.progress.step, self._last_step)
        self.memory.restart()
        with closing(self.loop.steps(self._needs_engine)) as steps:
            for step in () if self.best.stops else self._first_compiled(steps):
                self.memory.note()
                self._count(step)
                if self.best.stops:
                    break
                self.memory.restart()  # what validations and saves took is none of the next step's
        self.console.end()
        run_on_rank_zero(self.world, self.writer.close)
        return self._state()

    def _first_compiled(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps. In the first one torch compiles the layers, if it is to."""
        if self.training.compile == "layers":
            with Wait(self.console, "compiling the layers"):
                first = next(steps, None)
            if first is None:
                return
            yield first
        yield from steps

    def _count(self, step: Step) -> None:
        """Count a step, log it, and save a checkpoint if one is due."""
        loop, done = self.loop, (0.0, 0.0)
        if self.flops is not None:
            operations = self.flops.step(step.tokens, step.squares, step.units, cached_share(step, loop))
            done = (operations, self.flops.peak * step.seconds)
        self.record.add(self.phase.global_batch_size, step.tokens, step.seconds, *done)
        if loop.preempted_by:  # save before a validation, which may take longer than the signal's sender waits
            self._save()
        is_best = self._after_step(step_line(self.record, step, loop, self.flops))
        if loop.preempted_by:
            if self.best.metric is not None:  # what the validation has found belongs to the state
                self._save()
            self._stop()
        due = _due(self.training.save_every, loop.progress.step) and not loop.over()
        if due or (is_best and self.best.keeps):
            self._save()

    def _after_step(self, line: dict[str, object]) -> bool:
        """Log the step's line, with the validation where it is due. Returns whether it is the best one."""
        loop, is_best = self.loop, False
        # Counted in the run's own steps: a pilot does not shift them, and its loss says nothing about the run.
        if not self.phase.is_warmup and _due(self.training.eval_every, loop.progress.counted_steps):
            size = self.config.evaluation.micro_batch_size
            validation, objective = self.parts.splits.validation, self.context.objective
            ranks = self.world.rank, self.world.size
            with Wait(self.console, "validating", unit="batches") as wait:
                line["validation_loss"] = mean_loss(loop.engine.module, validation, objective, size, *ranks, wait)
            is_best = self._watch(line)
        logged = _due(self.training.log_every, loop.progress.step) or "validation_loss" in line or loop.over()
        self.parts.run_state.step(line, self._last_step, logged)
        if logged:
            line |= self.memory.take()
            run_on_rank_zero(self.world, lambda: self.writer.write(line))
            self.console.step(line, self._last_step)
        return is_best

    def _watch(self, line: dict[str, object]) -> bool:
        """Take what is followed off this validation, into the line too. Returns whether it is the best."""
        if self.best.metric is None:
            return False
        value = line["validation_loss"]
        if self.best.measures:
            predictions = self.context.folder.path / "predictions-validation.jsonl"
            metrics = self.watcher(self.loop.engine.module, predictions)
            value = line[f"validation_{self.best.metric}"] = metrics[self.best.metric]
        assert isinstance(value, float)
        is_best = self.best.note(self.loop.progress.step, value)
        if self.best.stops:
            self.console.log(f"stopping at step {self.loop.progress.step}: {self.best.describe()}")
        return is_best

    def _stop(self) -> NoReturn:
        """Close the logs and raise `PreemptionRequested`."""
        loop = self.loop
        if loop.prefix is not None:
            loop.prefix.flush()
        self.console.end()
        run_on_rank_zero(self.world, self.writer.close)
        self.parts.trackers.close(LEAVING_SECONDS)
        assert loop.preempted_by is not None
        raise PreemptionRequested(loop.preempted_by, f"saved step {loop.progress.step}")

    def _save(self) -> None:
        self.parts.save(self._state(), self.best.kept_step)

    def _state(self) -> TrainState:
        """The present state, from which a run can continue."""
        loop = self.loop
        return TrainState(
            **loop.engine.state_dict(),
            progress=copy.copy(loop.progress),
            phase=self.phase.to_dict(),
            callback=loop.callback.to_dict() if loop.callback else None,
            record=self.before.record.with_current(self.record, self.parts.trackers.ids, self.best.found),
            callback_tensors=loop.callback.tensors() if loop.callback else {},
        )

    def _needs_engine(self, progress: Progress) -> bool:
        """Whether a step that ends at `progress` is followed by a save or a validation."""
        validates = not self.phase.is_warmup and _due(self.training.eval_every, progress.counted_steps)
        return validates or _due(self.training.save_every, progress.step)

    @property
    def _last_step(self) -> int:
        """The last step of the phase's schedule."""
        return self.loop.schedule.last_step(self.loop.progress, self.phase.global_batch_size)

    def _count_trained(self, engine: Engine) -> int:
        """Number of trained values, without masked ones: adapters and fully trained modules."""
        whole = [name for name in engine.parameters if not is_adapter(name)]
        values = to_compact(self.phase.plan, engine.values(whole))
        return count_parameters(self.phase.plan, self.context.targets) + sum(map(torch.numel, values.values()))

    def _states_folder(self, lowest: int) -> Path:
        """Where the states that enter layer `lowest` lie on disk. Those of other layers are removed."""
        config, folder, subset = self.config, self.context.folder.prefix_cache, self.phase.subset

        def key() -> str:
            return content_key(
                base=hash_model(config.model),
                model=config.model.model_dump(include={"dtype", "quantization", "resize_embeddings"}),
                seed=config.seed,  # of rows that were added to the embeddings
                lowest=lowest,
                samples=self.parts.splits.key,
                subset=subset and asdict(subset),
                packing=config.task.packing,
            )

        found = broadcast_text(key() if self.world.rank == 0 else "")
        run_on_rank_zero(self.world, partial(keep_only, folder, found))
        return folder / found


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
