"""A run: a sequence of phases, each trained from the state the method made of the one before."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import transformers
from peft import PeftModel

from sparse_llm_ft.adapters import is_adapter
from sparse_llm_ft.checkpoint.state import Progress, TrainState
from sparse_llm_ft.checkpoint.store import newest_state, save_checkpoint
from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.context.course import Course
from sparse_llm_ft.context.preflight import Prepared
from sparse_llm_ft.context.setup import Setup
from sparse_llm_ft.data.streaming import StreamingDataset
from sparse_llm_ft.distributed.collectives import broadcast_int, run_on_rank_zero
from sparse_llm_ft.distributed.signals import exit_if_preempted
from sparse_llm_ft.engine.build import build_model, engine_settings, fresh_heads, rebuild_model
from sparse_llm_ft.engine.engine import Engine, check_deepspeed, init_distributed
from sparse_llm_ft.engine.handover import load_state, masks_of, read_state
from sparse_llm_ft.errors import ConfigError, PreemptionRequested, UserError
from sparse_llm_ft.evaluation.evaluator import Evaluator
from sparse_llm_ft.evaluation.loop import mean_loss
from sparse_llm_ft.export.adapter import export
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.model.loading import check_weights
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan
from sparse_llm_ft.report import write_report
from sparse_llm_ft.run_folder import PLAN, SUMMARY, RunFolder
from sparse_llm_ft.training.batch_size import check_growth, grown_batch, resumed_batch
from sparse_llm_ft.training.callbacks import build_callback
from sparse_llm_ft.training.loop import Loop, Step
from sparse_llm_ft.training.metrics_logger import MetricsLogger
from sparse_llm_ft.training.records import (
    PhaseRecord,
    finished_phase_file,
    in_brief,
    phase_file,
    show_summary,
    summarize,
)
from sparse_llm_ft.training.scorer import Scorer


def run(prepared: Prepared) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint if there is one; returns the summary (summary.json).

    Every rank calls it. A run that is already complete only shows its summary again.

    Raises:
        UserError: what only model or DeepSpeed show to be wrong, before weights are loaded; a folder that cannot be
            written or is in use; checkpoints that are all damaged.
        TrainingError: too many losses that are not finite, or no adapter left.
        LeaveRequest: a signal asked for it; what was trained is saved.
    """
    config, world, folder = prepared.config, prepared.world, prepared.folder
    transformers.utils.logging.disable_progress_bar()  # every rank would draw its own
    console = Console(world.rank)
    check_deepspeed(config.deepspeed.extra)
    setup = Setup.of(prepared)
    check_weights(config.model)
    init_distributed()
    course = Course.of(prepared, setup)
    check_growth(config, course.first, setup.task_mode)
    if broadcast_int(int(folder.is_complete())):
        console.log(f"{folder.path} is complete; nothing to do")
        summary = folder.summary()
        if config.report and world.rank == 0 and not folder.report.is_dir():  # killed between its end and the pictures
            _draw_report(folder, console)
        show_summary(summary, folder, console)
    else:
        summary = Run(prepared, console, setup, course).train()
    dist.destroy_process_group()
    return summary


def derive(prepared: Prepared) -> None:
    """Only what a run with Partial-LoRA measures before it trains; the result stays in the cache. Changes no folder.

    Raises:
        UserError: as `run`; or the run derives nothing.
    """
    config, world = prepared.config, prepared.world
    transformers.utils.logging.disable_progress_bar()
    console = Console(world.rank)
    setup = Setup.of(prepared)
    check_weights(config.model)
    init_distributed()
    course = Course.of(prepared, setup)
    if course.first.scoring is None or course.first.scoring.kind != "derivation":
        raise UserError(
            f"method.name: {config.method_name} derives nothing before it trains; expected partial_lora, with "
            "ratios: derived or another selection than random"
        )
    Run(prepared, console, setup, course).derive()
    dist.destroy_process_group()


def _draw_report(folder: RunFolder, console: Console) -> None:
    """Pictures come last and are only drawn from what is written; a run without them is as complete."""
    try:
        write_report([folder.path], folder.report)
    except Exception as error:
        console.log(
            f"the report could not be drawn ({type(error).__name__}: {error}); the run is complete, and "
            f"`sparse-llm-ft report {folder.path}` tries again"
        )


class Run:
    """What stays the same from phase to phase: data, tokenizer, frozen base, folder."""

    def __init__(self, prepared: Prepared, console: Console, setup: Setup, course: Course) -> None:
        self.config: RunConfig = prepared.config
        self.world, self.folder, self.course = prepared.world, prepared.folder, course
        self.console, self.setup, self.samples, self.schedule = console, setup, course.samples, course.schedule
        self.targets = setup.targets
        self.evaluator = Evaluator(
            self.config.evaluation,
            prepared.task,
            setup.task_mode,
            course.samples.measured,
            setup.tokenizer,
            setup.objective,
            self.world,
            self.config.deepspeed.zero_stage,
            self.config.seed,
        )
        self.scorer = Scorer(self.config, self.world, setup.objective, console)

    def train(self) -> dict[str, Any]:
        """All phases, then the final measurement, the adapter and the summary."""
        state, phase = self._begin(self.course.first)
        model = self._build_model(phase)
        if state is None:
            record: dict[str, Any] = {
                "run": RunFolder.identity(self.config),
                "before": None,
                "samples": self.samples.key,
                "phases": [],
                "micro_batch_size": self.config.training.micro_batch_size,
            }
            state = TrainState({}, {}, {}, Progress(), phase.to_dict(), record=record)
        while True:
            engine, state = self._train_phase(model, phase, state)
            scores = self.scorer(engine, phase, self.course.samples_of(phase), state.tensors)
            following = self.course.methods.next(phase, state, scores, self.targets)
            self._write(finished_phase_file(phase, state, scores, following and following[0].plan, self.targets))
            if following is None:
                return self._finish(engine, phase, state)
            engine.close()
            state.record["current"]["measured"] = in_brief(scores, phase)
            model, phase, state = self._change_phase(model, phase, *following)

    def derive(self) -> None:
        """Fit the head if the first phase does, measure, and show the ratios."""
        phase = self._with_steps(self.course.first)
        model = self._build_model(phase)
        engine = Engine(model, engine_settings(self.config, phase, self.world.size))
        loop = self._loop(engine, phase, TrainState({}, {}, {}, Progress(), {}))
        for _ in loop.steps():
            exit_if_preempted()
        scores = self.scorer(engine, phase, self.course.samples_of(phase), engine.values())
        engine.close()
        self.console.show_ratios(in_brief(scores, phase), getattr(scores, "ratios", {}))

    def _begin(self, first: Phase) -> tuple[TrainState | None, Phase]:
        """Take the folder, find where to begin, and write what a folder holds from the start."""
        run_on_rank_zero(self.world, self.folder.lock)
        run = RunFolder.identity(self.config)
        state = newest_state(self.folder, run, self.world, self.console, self.setup.expected)
        phase = first
        if state is not None:
            self._check_samples(state.record)
            configured = self.config.training.micro_batch_size
            anew = configured if configured != state.record["micro_batch_size"] else None
            state.record["micro_batch_size"] = configured
            phase = resumed_batch(Phase.from_dict(state.phase), self.world.size, anew)
            phase = self.course.methods.resumed(phase)
        phase = self._with_steps(phase)
        run_on_rank_zero(self.world, lambda: self.folder.begin(self.config, state.progress.step if state else 0))
        self._write_phase(phase, state.progress if state else Progress())
        for line in self.samples.remarks(self.config.task):
            self.console.log(line)
        return state, phase

    def _check_samples(self, record: Mapping[str, Any]) -> None:
        """Refuse to go on with other samples: the place in those to train on is a number, and would mean others, and
        what is measured at the end would not be what was measured at the beginning.

        Raises:
            ConfigError: rows, tokenizer or package are not those that the run began with.
        """
        if record.get("samples", self.samples.key) != self.samples.key:
            raise ConfigError(
                "task",
                "the samples are not those that the run began with: rows or tokenizer have changed",
                "expected the same ones, or another output_dir",
            )

    def _train_phase(self, model: PeftModel, phase: Phase, state: TrainState) -> tuple[Engine, TrainState]:
        """Train one phase to its end; returns its engine and the state there, which is also its last checkpoint."""
        engine = Engine(model, engine_settings(self.config, phase, self.world.size), masks_of(phase.plan))
        load_state(engine, phase.plan, state)
        if self.evaluator.parts and state.record["before"] is None and state.progress.step == 0:
            # Not before there is an engine: at stage 3 no rank has the weights whole until its hooks gather them.
            self.console.log(f"measuring {self.evaluator.count} {self.config.evaluation.split} samples")
            state.record["before"] = self.evaluator(engine.module, self.folder.path / "predictions-before.jsonl")
        loop = self._loop(engine, phase, state)
        progress = loop.progress
        record = PhaseRecord.of(phase, state.record, self._trained(phase.plan, engine), engine.optimizer_bytes())
        writer = MetricsLogger(self.folder, self.world.rank, progress.step)
        run_on_rank_zero(self.world, writer.open)
        exit_if_preempted()
        self.console.begin(phase.name, progress.step, self._last_step(loop))
        for step in loop.steps():
            record.add(step, phase)
            if loop.preempted_by:  # before a validation that may take longer than whoever asked will wait
                self._save(self._read_state(loop, record, state))
            self._after_step(step, loop, record, writer)
            if loop.preempted_by:
                self._leave(loop, writer)
            if self._due(self.config.training.save_every, progress.step) and not loop.over():
                self._save(self._read_state(loop, record, state))
        self.console.end()
        run_on_rank_zero(self.world, writer.close)
        state = self._read_state(loop, record, state)
        self._save(state)
        return engine, state

    def _loop(self, engine: Engine, phase: Phase, state: TrainState) -> Loop:
        """The phase's loop, going on from `state`."""
        samples, schedule = self.course.units(phase), self.schedule
        if phase.is_warmup:
            schedule = schedule.is_warmup(phase.steps or 0, len(samples), phase.learning_rate)
        return Loop(
            engine,
            phase,
            build_callback(phase, state, engine),
            samples,
            self.setup.objective,
            schedule,
            copy.copy(state.progress),
            self.world,
            self.config.seed,
            self.config.training.max_skipped_updates,
        )

    def _change_phase(
        self, model: PeftModel, before: Phase, phase: Phase, state: TrainState
    ) -> tuple[PeftModel, Phase, TrainState]:
        """Put the new plan on the model, around the same frozen base."""
        length = self.course.longest
        phase = self._with_steps(
            grown_batch(phase, before, self.config, self.targets, length, self.world.size, self.setup.task_mode)
        )
        grown = phase.micro_batch_size > before.micro_batch_size
        model = rebuild_model(self.config, model, before.plan, phase.plan)
        progress = replace(state.progress, phase=state.progress.phase + 1, phase_step=0, phase_skipped=0)
        if before.is_warmup:
            progress = replace(progress, start_step=progress.step, start_samples=progress.samples)
        finished = [*state.record["phases"], state.record["current"]]
        record = {key: value for key, value in state.record.items() if key != "current"} | {"phases": finished}
        self._write_phase(phase, progress)
        self.console.log(
            f"phase {before.name} ends at step {progress.step}: {before.plan.describe()} -> "
            f"{phase.plan.describe()}, micro-batch {before.micro_batch_size} -> "
            f"{phase.micro_batch_size}, global batch {phase.global_batch_size}"
            + (" (no larger micro-batch both fits and divides)" if phase.batch_growth != "none" and not grown else "")
        )
        tensors = self.head | state.tensors  # a method that starts anew leaves the head out: it begins as it was loaded
        return model, phase, replace(state, tensors=tensors, progress=progress, phase=phase.to_dict(), record=record)

    def _finish(self, engine: Engine, phase: Phase, state: TrainState) -> dict[str, Any]:
        """Measure what was trained, export it, write the summary and the report."""
        after = None
        if self.evaluator.parts:
            after = self.evaluator(engine.module, self.folder.path / "predictions-after.jsonl")
        exit_if_preempted()
        engine.close()
        train = self.samples.train
        if isinstance(train, StreamingDataset) and train.skipped.count:
            self.console.log(f"of the training rows that were read last: {train.skipped}")
        summary = summarize(
            self.config, self.world, state.record, after, self.samples.sizes(self.config.evaluation.split)
        )

        def write() -> None:
            folder = self.folder.model if FULL_MODEL in phase.plan.trained else self.folder.adapter
            export(folder, self.config.model, self.setup.empty, phase.plan, state.tensors)
            self.folder.write_json(SUMMARY, summary)

        run_on_rank_zero(self.world, write)
        if self.config.report and self.world.rank == 0:
            _draw_report(self.folder, self.console)
        show_summary(summary, self.folder, self.console)
        return summary

    def _after_step(self, step: Step, loop: Loop, record: PhaseRecord, writer: MetricsLogger) -> None:
        training, at = self.config.training, loop.progress.step
        line = record.line(step, loop)
        # In the run's own steps, so that a pilot does not shift them; a pilot's loss says nothing of the run.
        if not loop.phase.is_warmup and self._due(training.eval_every, loop.progress.counted_steps):
            line["validation_loss"] = mean_loss(
                loop.engine.module,
                self.samples.validation,
                self.setup.objective,
                self.config.evaluation.micro_batch_size,
                self.world.rank,
                self.world.size,
            )
        if self._due(training.log_every, at) or "validation_loss" in line or loop.over():
            run_on_rank_zero(self.world, lambda: writer.write(line))
            self.console.step(line, self._last_step(loop))

    def _leave(self, loop: Loop, writer: MetricsLogger) -> NoReturn:
        self.console.end()
        run_on_rank_zero(self.world, writer.close)
        raise PreemptionRequested(f"{loop.preempted_by}: saved step {loop.progress.step}")

    def _last_step(self, loop: Loop) -> int:
        """The step that the phase's part of the run ends with."""
        return loop.schedule.last_step(loop.progress, loop.phase.global_batch_size)

    def _with_steps(self, phase: Phase) -> Phase:
        """The phase with the steps that its passes over its subset make."""
        if phase.epochs is None:
            return phase
        samples = phase.epochs * len(self.course.units(phase))
        return replace(phase, steps=max(1, math.ceil(samples / phase.global_batch_size)))

    def _trained(self, plan: AdapterPlan, engine: Engine) -> int:
        """Number of trained values: the adapters', without what a mask holds at zero, and modules trained whole."""
        whole = [name for name in engine.parameters if not is_adapter(name)]
        return plan.parameters(self.targets) + sum(map(torch.numel, engine.values(whole).values()))

    def _read_state(self, loop: Loop, record: PhaseRecord, before: TrainState) -> TrainState:
        tensors, moments = read_state(loop.engine, loop.phase.plan)
        return TrainState(
            tensors,
            moments,
            loop.engine.optimizer_steps(),
            copy.copy(loop.progress),
            loop.phase.to_dict(),
            loop.callback.to_dict() if loop.callback else None,
            {**before.record, "current": record.to_dict()},
            loop.callback.tensors() if loop.callback else {},
        )

    def _save(self, state: TrainState) -> None:
        keep = self.config.training.keep_checkpoints
        run_on_rank_zero(self.world, lambda: save_checkpoint(self.folder.checkpoints, state, keep))

    def _write_phase(self, phase: Phase, progress: Progress) -> None:
        """What a phase is, when it begins."""
        run_on_rank_zero(self.world, lambda: self.folder.write_json(PLAN, phase.plan.to_dict()))
        self._write(phase_file(phase, progress, self.targets))

    def _write(self, file: tuple[str, Mapping[str, Any]]) -> None:
        run_on_rank_zero(self.world, lambda: self.folder.write_json(*file))

    def _build_model(self, phase: Phase) -> PeftModel:
        exit_if_preempted()
        self.console.log(f"loading {self.config.model.name}")
        settings = engine_settings(self.config, phase, self.world.size).to_deepspeed()
        model = build_model(self.config, self.setup.task_mode, phase.plan, settings)
        self.head = fresh_heads(model, phase.plan)
        return model

    @staticmethod
    def _due(every: int | None, step: int) -> bool:
        return every is not None and step % every == 0
