"""`PhaseTraining`: one phase on one engine. It runs the loop, does what is due after a step, and reads the state."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
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
from sparse_llm_ft.distributed.collectives import broadcast_text, run_long_on_rank_zero, run_on_rank_zero
from sparse_llm_ft.distributed.signals import exit_if_preempted
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.engine.memory_guard import MemoryGuard
from sparse_llm_ft.engine.peak_memory import PeakMemory
from sparse_llm_ft.errors import PreemptionRequested
from sparse_llm_ft.evaluation.loop import mean_loss
from sparse_llm_ft.io.content_cache import content_key
from sparse_llm_ft.io.wait import Wait
from sparse_llm_ft.model.flops import plan_flops
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
            run_long_on_rank_zero(self.context.world, lambda: save_checkpoint(folder, state, keep, protect))
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
        self.writer = MetricsLogger(context.folder, self.world.rank, before.logged_step, parts.trackers, tensorboard)
        self.unvalidated: Mapping[str, object] | None = None  # the present step's line, see `RunRecord`
        self.flops = plan_flops(context.empty, phase.plan, self.config.model.dtype, self.loop.device, self.world.size)

    def train(self) -> TrainState:
        """Make the steps. Returns the state after the last one.

        Raises:
            PreemptionRequested: a signal asked the run to stop; the state is saved.
        """
        run_on_rank_zero(self.world, self.writer.open)
        exit_if_preempted()
        self.console.begin(self.phase.name, self.loop.progress.step, self._last_step)
        if (line := self.before.record.unvalidated) is not None:
            self._conclude(line.model_dump())
        self.memory.restart()
        with closing(self.loop.steps(self._needs_engine)) as steps:
            for step in () if self.best.stops else self._first_compiled(steps):
                self.memory.note()
                self._count(step)
                if self.best.stops:
                    break
                self.memory.restart()  # what validations and saves took is none of the next step's
        if self.loop.callback is not None and not self.loop.out_of_memory:
            self.loop.callback.at_end(self.loop.engine, self.loop.progress.phase_updates)
        self.console.end()
        self._close()
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
        """Count a step, and do what is due behind it."""
        loop, done = self.loop, (0.0, 0.0)
        if self.flops is not None:
            operations = self.flops.step(step.tokens, step.squares, step.units, cached_share(step, loop))
            done = (operations, self.flops.peak * step.seconds)
        self.record.add(self.phase.global_batch_size, step.tokens, step.seconds, *done)
        self._conclude(step_line(self.record, step, loop, self.flops))

    def _conclude(self, line: dict[str, object]) -> None:
        """Validate where it is due, log the line of the step just made, and save a checkpoint if one is due.

        Raises:
            PreemptionRequested: a signal asked the run to stop; the state is saved. A validation, which may take longer
                than the signal's sender waits, is then left to the resumed run, and with it the line.
        """
        loop, is_best = self.loop, False
        if self._validates(loop.progress):
            try:
                if loop.preempted_by is not None:
                    raise PreemptionRequested(loop.preempted_by, "")
                line, is_best = self._validated(line)
            except PreemptionRequested as request:
                self.parts.run_state.step(line, self._last_step, False)
                self.unvalidated = line | self.memory.take()
                self._save()
                self._stop(request.signal_name)
        self._log(line)
        if loop.preempted_by is not None:
            self._save()
            self._stop(loop.preempted_by)
        due = _due(self.training.save_every, loop.progress.step) and not loop.over()
        if due or (is_best and self.best.keeps):
            self._save()

    def _validates(self, progress: Progress) -> bool:
        """Whether a validation follows the step that ends at this progress.

        Counted in the run's own steps: a pilot does not shift them, and its loss says nothing about the run.
        """
        return not self.phase.is_warmup and _due(self.training.eval_every, progress.counted_steps)

    def _validated(self, line: Mapping[str, object]) -> tuple[dict[str, object], bool]:
        """The line with the validation, and whether it is the best one.

        Raises:
            PreemptionRequested: a signal asked the run to stop meanwhile; nothing has changed.
        """
        size = self.config.evaluation.micro_batch_size
        validation, objective = self.parts.splits.validation, self.context.objective
        ranks = self.world.rank, self.world.size
        with Wait(self.console, "validating", unit="batches") as wait:
            loss = mean_loss(self.loop.engine.module, validation, objective, size, *ranks, wait)
        validated = {**line, "validation_loss": loss}
        return validated, self._watch(validated)

    def _log(self, line: dict[str, object]) -> None:
        """Log a step's line, if one is due."""
        step = self.loop.progress.step
        logged = _due(self.training.log_every, step) or "validation_loss" in line or self.loop.over()
        self.parts.run_state.step(line, self._last_step, logged)
        if logged:
            line |= self.memory.take()
            self._write(line)
            self.console.step(line, self._last_step)

    def _write(self, line: Mapping[str, object]) -> None:
        """Write a line. An error is raised on all ranks with the next step, a save or the end (`Loop.failure`)."""
        if self.loop.failure is None:
            try:
                self.writer.write(line)
            except Exception as error:  # of any type, as in `run_on_rank_zero`
                self.loop.failure = error

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

    def _stop(self, signal_name: str) -> NoReturn:
        """Close the logs and raise `PreemptionRequested`."""
        loop = self.loop
        if loop.prefix is not None:
            loop.prefix.flush()
        self.console.end()
        self._close()
        self.parts.trackers.close(LEAVING_SECONDS)
        raise PreemptionRequested(signal_name, f"saved step {loop.progress.step}")

    def _close(self) -> None:
        """Close the logs, and raise what has failed on the way there, see `Loop.failure`."""

        def close() -> None:
            self.loop.raise_failure()
            self.writer.close()

        run_on_rank_zero(self.world, close)

    def _save(self) -> None:
        run_on_rank_zero(self.world, self.loop.raise_failure)  # a run that resumes from here would not write the line
        self.parts.save(self._state(), self.best.kept_step)

    def _state(self) -> TrainState:
        """The present state, from which a run can continue."""
        loop = self.loop
        return TrainState(
            **loop.engine.state_dict(),
            progress=copy.copy(loop.progress),
            phase=self.phase.to_dict(),
            callback=loop.callback.to_dict() if loop.callback else None,
            record=self.before.record.with_current(
                self.record, self.parts.trackers.ids, self.best.found, self.unvalidated
            ),
            callback_tensors=loop.callback.tensors() if loop.callback else {},
        )

    def _needs_engine(self, progress: Progress) -> bool:
        """Whether a step that ends at `progress` is followed by a save or a validation."""
        return self._validates(progress) or _due(self.training.save_every, progress.step)

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
