"""`Run`: a sequence of phases. Each one starts from the state that the method made of the phase before."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from peft import PeftModel

from sparse_llm_ft.adapters import count_parameters, is_adapter
from sparse_llm_ft.adapters.masking import to_compact
from sparse_llm_ft.checkpoint.record import PhaseRecord, RunRecord
from sparse_llm_ft.checkpoint.state import Progress, TrainState
from sparse_llm_ft.checkpoint.store import newest_state, save_checkpoint
from sparse_llm_ft.config import check_steps
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.data.dataset import Splits
from sparse_llm_ft.data.streaming import StreamingDataset
from sparse_llm_ft.data.training_set import TrainingSet
from sparse_llm_ft.distributed.collectives import (
    ALONE,
    Coordination,
    broadcast_int,
    broadcast_text,
    coordinate,
    run_on_rank_zero,
)
from sparse_llm_ft.distributed.signals import exit_if_preempted
from sparse_llm_ft.engine.build import build_model, engine_settings, fresh_heads, rebuild_model, untrained_tensors
from sparse_llm_ft.engine.engine import Engine, process_group
from sparse_llm_ft.engine.memory_guard import MemoryGuard
from sparse_llm_ft.errors import PreemptionRequested, UserError
from sparse_llm_ft.evaluation.loop import mean_loss
from sparse_llm_ft.export.adapter import export
from sparse_llm_ft.export.trial import try_export
from sparse_llm_ft.io.content_cache import content_key
from sparse_llm_ft.methods.chain import Chain
from sparse_llm_ft.model.architecture import base_of
from sparse_llm_ft.model.flops import StepFlops, step_flops
from sparse_llm_ft.model.loading import check_weights
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan
from sparse_llm_ft.planning.batch_size import Peak, first_batch, grown_batch, resumed_batch, settle_growth, shrunk_batch
from sparse_llm_ft.planning.forecast import budget_peak
from sparse_llm_ft.planning.micro_batch import settle_micro_batch
from sparse_llm_ft.planning.phases import memory_of
from sparse_llm_ft.run_folder import PLAN_FILE, SUMMARY_FILE, RunFolder
from sparse_llm_ft.scoring.cache import hash_model
from sparse_llm_ft.training.callbacks import build_callback
from sparse_llm_ft.training.loop import Loop, Step
from sparse_llm_ft.training.metrics_logger import MetricsLogger
from sparse_llm_ft.training.prefix_cache import open_prefix
from sparse_llm_ft.training.prefix_store import keep_only
from sparse_llm_ft.training.records import (
    cached_share,
    check_samples,
    describe_measurement,
    describe_phase,
    draw_report,
    finished_phase_file,
    mask_remarks,
    phase_file,
    remarks,
    show_summary,
    step_line,
    summarize,
)
from sparse_llm_ft.training.schedule import Schedule
from sparse_llm_ft.training.scorer import Scorer


def train(context: RunContext) -> dict[str, Any]:
    """Collective. Train to the end, from the newest checkpoint if there is one, and return the summary (summary.json).

    A run that is already complete only prints its summary again.

    Raises:
        UserError: the data cannot be used or do not fit the settings; the folder cannot be written or is in use; all
            checkpoints are damaged.
        TrainingError: too many losses are not finite, or no adapter is left.
        PreemptionRequested: a signal asked the run to stop; its state is saved.
    """
    folder, console, world = context.folder, context.console, context.world
    with process_group():
        run = _prepared(context)
        if not broadcast_int(int(folder.is_complete())):
            return run.train()
        console.log(f"{folder.path} is complete; nothing to do")
        summary = folder.summary()
        # The run may have been killed after its end, before its report.
        if context.config.report and world.rank == 0 and not folder.report.is_dir():
            draw_report(folder, console)
        show_summary(summary, folder, console)
        return summary


def derive(context: RunContext) -> None:
    """Collective. Only derive Partial-LoRA's ratios, into the cache. Writes no run folder.

    Raises:
        UserError: as in `train`; or the run derives nothing.
    """
    scoring = context.first_phase().scoring
    if scoring is None or scoring.kind != "derivation":
        raise UserError(
            f"method.name: {context.config.method_name} derives nothing before it trains; expected partial_lora, with "
            "ratios: derived or another selection than random"
        )
    with process_group():
        _prepared(context).derive()


def _prepared(context: RunContext) -> Run:
    """Collective. The run, with its data read."""
    transformers.utils.logging.disable_progress_bar()  # every rank would draw its own
    return Run.prepare(context, coordinate(context.world, "reading and tokenising the data"))


class Run:
    """A run that is about to start: its context, its data, its methods and its first phase.

    Attributes:
        first: the run's first phase.
        peak: plans a phase, where a method has a memory budget.
    """

    def __init__(
        self,
        context: RunContext,
        splits: Splits,
        data: TrainingSet,
        schedule: Schedule,
        methods: Chain,
        first: Phase,
        peak: Peak | None = None,
    ) -> None:
        self.context, self.config, self.world, self.folder = context, context.config, context.world, context.folder
        self.console, self.targets = context.console, context.targets
        self.splits, self.data, self.schedule, self.methods, self.first = splits, data, schedule, methods, first
        self.peak = peak
        self.evaluator = context.evaluator(splits.measured)
        self.scorer = Scorer(self.config, self.world, context.objective, self.console)

    @classmethod
    def prepare(cls, context: RunContext, ranks: Coordination = ALONE) -> Run:
        """Collective, as `ranks` says. Read the data, or find them in the cache, and plan the first phase.

        Raises:
            UserError: the base has no weights; rows cannot be used; settings do not fit the run's length; batch growth
                is set for a model whose memory cannot be traced.
        """
        context = context.dated(ranks.broadcast)
        config, task_mode = context.config, context.task_mode
        check_weights(config.model)
        # As at the run's end: on other ranks transformers saves nothing.
        ranks.on_rank_zero(lambda: try_export(context, context.first_phase().plan))
        splits = Splits.encode(config, context.task, context.tokenizer, task_mode, ranks, context.embeddings)
        data = TrainingSet(splits.train, context.task, config.task)
        schedule = Schedule(config.training, data.size)
        check_steps(config, schedule.total_steps)
        first = context.methods(schedule.total_steps).first(context.plan, context.targets)
        config = settle_growth(config, first, task_mode, data.longest, context.console)
        context = replace(context, config=config)
        config = settle_micro_batch(context, ranks)
        context = replace(context, config=config)
        context.folder.check(config, resolved=True)
        # Under a memory budget, the planner decides which adapters may live, and the phases' micro-batches.
        peak = budget_peak(context, on_gpu=torch.cuda.is_available())
        methods = context.methods(schedule.total_steps, memory_of(config, peak))
        first = first_batch(methods.first(context.plan, context.targets), config, context.world.size, peak)
        if first.micro_batch_size != config.training.fixed_micro_batch_size:
            context.console.log(
                f"phase {first.name} has micro-batch {first.micro_batch_size}, see method.budget.memory"
            )
        return cls(context, splits, data, schedule, methods, first, peak)

    def describe(self) -> list[str]:
        """Lines for people: the data, the run's length, samples shortened or left out, the first phase and its size."""
        return [
            f"{self.data.describe()}, {self.schedule.total_steps} optimizer steps",
            *remarks(self.context, self.splits, self.data, self.first),
            *describe_phase(self.context, self.first),
            *filter(None, [self.methods.outlook(self.first, self.targets)]),
        ]

    def train(self) -> dict[str, Any]:
        """Collective. Train all phases, evaluate, export the adapter, and return the summary."""
        state, phase = self._begin(self.first)
        model = self._build_model(phase)
        if state is None:  # a new run: nothing is trained yet
            run, size = RunFolder.identity(self.config), self.config.training.fixed_micro_batch_size
            record = RunRecord(run=run, samples=self.splits.key, micro_batch_size=size)
            state = TrainState({}, {}, {}, Progress(), phase.to_dict(), record=record)
        while True:
            # Train the phase and take its scores; the method makes the next phase from them.
            engine, phase, state = self._train_phase(model, phase, state)
            scores = self.scorer(engine, phase, *self._scored(phase), state.tensors)
            following = self.methods.next(phase, state, scores, self.targets)
            self._write(finished_phase_file(phase, state, scores, following and following[0].plan, self.targets))
            if following is None:
                return self._finish(engine, phase, state)
            # Replace the adapters by the next plan's, around the same base.
            engine.close()
            remarks = (describe_measurement(scores, phase), self.methods.remark(phase, following[0], self.targets))
            measured = "; ".join(filter(None, remarks)) or None
            model, phase, state = self._change_phase(model, phase, *following, measured)

    def derive(self) -> None:
        """Collective. Derive the ratios of the first phase and print them."""
        # Build the model as a run would, but without a run folder.
        phase = self._with_steps(self.first)
        model = self._build_model(phase)
        engine = Engine(model, engine_settings(self.config, phase, self.world.size))
        loop = self._loop(engine, phase, TrainState({}, {}, {}, Progress(), {}))
        # Fit the head, if the phase trains one; then derive.
        for _ in loop.steps():
            exit_if_preempted()
        scores = self.scorer(engine, phase, *self._scored(phase), engine.values())
        engine.close()
        self.console.show_ratios(describe_measurement(scores, phase), getattr(scores, "ratios", {}))

    def _scored(self, phase: Phase) -> tuple[Sequence[Any], Sequence[Any]]:
        """The samples that a phase's scores are taken on, and others that the phase trained on."""
        scored = phase.scored
        return self.data.subset(scored), () if scored == phase.subset else self.data.subset(phase.subset)

    def _begin(self, first: Phase) -> tuple[TrainState | None, Phase]:
        """Collective. Take the folder, find the state and phase to begin with, and write the folder's first files."""
        # Find the newest checkpoint; only this process may use the folder from here on.
        run_on_rank_zero(self.world, self.folder.lock)
        run = RunFolder.identity(self.config)
        state = newest_state(self.folder, run, self.world, self.console, self.context.expected)
        phase = first
        if state is not None:
            # Resume its phase, for the present number of ranks and with the settings that have changed since.
            check_samples(state.record, self.splits.key)
            configured = self.config.training.fixed_micro_batch_size
            changed = configured if configured != state.record.micro_batch_size else None
            state.record.micro_batch_size = configured
            phase = resumed_batch(Phase.from_dict(state.phase), self.world.size, changed)
            phase = self.methods.resumed(phase)
        phase = self._with_steps(phase)
        run_on_rank_zero(self.world, lambda: self.folder.begin(self.config, state.progress.step if state else 0))
        self._write_phase(phase, state.progress if state else Progress())
        for line in remarks(self.context, self.splits, self.data, first):
            self.console.log(line)
        return state, phase

    def _train_phase(self, model: PeftModel, phase: Phase, state: TrainState) -> tuple[Engine, Phase, TrainState]:
        """Collective. Train one phase to its end; returns its engine and its last state, which is also saved.

        The phase returned has a smaller micro-batch where memory did not suffice for the given one.
        """
        outlook = self.methods.outlook(phase, self.targets)
        for remark in (*mask_remarks(phase.plan, self.targets, self.config.adapter), *filter(None, [outlook])):
            self.console.log(remark)
        while True:
            engine, state, out_of_memory = self._train_until(model, phase, state)
            self._save(state)  # if the run is killed during the phase change, it repeats the change
            if not out_of_memory:
                return engine, phase, state
            # Continue from the step before, with a new engine around the same model.
            engine.close()
            smaller = shrunk_batch(phase, self.world.size, state.progress.step + 1)
            state = replace(state, phase=smaller.to_dict(), record=state.record.shrunk(smaller.micro_batch_size))
            self._save(state)
            self.console.log(
                f"step {state.progress.step + 1} ran out of memory and is made again: micro-batch "
                f"{phase.micro_batch_size} -> {smaller.micro_batch_size}, global batch {phase.global_batch_size}"
            )
            phase = smaller

    def _train_until(self, model: PeftModel, phase: Phase, state: TrainState) -> tuple[Engine, TrainState, bool]:
        """Collective. Train a phase to its end, or until memory does not suffice for a step: its engine, the state
        after the last step made, and whether memory did not suffice.
        """
        engine = Engine(model, engine_settings(self.config, phase, self.world.size), phase.plan)
        engine.load_state_dict(state.engine_state)
        if self.evaluator.parts and state.record.before is None and state.progress.step == 0:
            # The first evaluation needs the engine: at stage 3 its hooks gather the weights.
            self.console.log(f"measuring {self.evaluator.count} {self.config.evaluation.split} samples")
            state.record.before = self.evaluator(engine.module, self.folder.path / "predictions-before.jsonl")
        # Open the phase's loop, record and logs.
        loop = self._loop(engine, phase, state)
        if self.config.training.on_oom == "shrink":
            loop.guard = MemoryGuard(engine)
        folder = partial(self._states_folder, phase)
        loop.prefix = open_prefix(loop, self.config.training, self.console.log, folder)
        progress = loop.progress
        record = PhaseRecord.of(
            phase, state.record.current, self._trained(phase.plan, engine), engine.optimizer_bytes()
        )
        writer = MetricsLogger(self.folder, self.world.rank, progress.step)
        run_on_rank_zero(self.world, writer.open)
        exit_if_preempted()
        self.console.begin(phase.name, progress.step, self._last_step(loop))

        # Train, and after each step look at what is due.
        flops = step_flops(self.context.empty, phase.plan, self.config.model.dtype, loop.device, self.world.size)
        with closing(loop.steps(partial(self._needs_engine, phase))) as steps:
            for step in steps:
                self._count(step, loop, record, state, writer, flops)
        self.console.end()
        run_on_rank_zero(self.world, writer.close)
        return engine, self._read_state(loop, record, state), loop.out_of_memory

    def _needs_engine(self, phase: Phase, progress: Progress) -> bool:
        """Whether a step that ends at `progress` is followed by a save or a validation."""
        training = self.config.training
        validates = not phase.is_warmup and self._due(training.eval_every, progress.counted_steps)
        return validates or self._due(training.save_every, progress.step)

    def _count(
        self,
        step: Step,
        loop: Loop,
        record: PhaseRecord,
        state: TrainState,
        writer: MetricsLogger,
        flops: StepFlops | None,
    ) -> None:
        """Collective. Count a step, log it, and save a checkpoint if one is due."""
        done = (0.0, 0.0)
        if flops is not None:
            operations = flops.step(step.tokens, step.squares, step.units, cached_share(step, loop))
            done = (operations, flops.peak * step.seconds)
        record.add(loop.phase.global_batch_size, step.tokens, step.seconds, *done)
        if loop.preempted_by:  # save before a validation, which may take longer than the signal's sender waits
            self._save(self._read_state(loop, record, state))
        self._after_step(step_line(record, step, loop, flops), loop, writer)
        if loop.preempted_by:
            self._stop(loop, writer)
        if self._due(self.config.training.save_every, loop.progress.step) and not loop.over():
            self._save(self._read_state(loop, record, state))

    def _loop(self, engine: Engine, phase: Phase, state: TrainState) -> Loop:
        """Collective. The phase's loop, continuing from `state`."""
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
            self.world,
            self.config.seed,
            self.config.training.max_skipped_updates,
        )

    def _states_folder(self, phase: Phase, lowest: int) -> Path:
        """Collective. Where the states that enter layer `lowest` lie on disk. Those of other layers are removed."""
        model, folder = self.config.model, self.folder.prefix_cache

        def key() -> str:
            return content_key(
                base=hash_model(model),
                model=model.model_dump(include={"dtype", "quantization", "resize_embeddings"}),
                seed=self.config.seed,  # of rows that were added to the embeddings
                lowest=lowest,
                samples=self.splits.key,
                subset=phase.subset and asdict(phase.subset),
                packing=self.config.task.packing,
            )

        found = broadcast_text(key() if self.world.rank == 0 else "")
        run_on_rank_zero(self.world, lambda: keep_only(folder, found))
        return folder / found

    def _change_phase(
        self, model: PeftModel, before: Phase, phase: Phase, state: TrainState, measured: str | None
    ) -> tuple[PeftModel, Phase, TrainState]:
        """Collective. Put the next phase's plan on the model, around the same frozen base."""
        # Set the phase's batch sizes, and build its adapters.
        length = self.data.longest
        phase, planned = grown_batch(
            phase,
            before,
            self.config,
            self.targets,
            length,
            self.world.size,
            self.context.task_mode,
            self.context.expected.parameters,
            self.peak,
        )
        phase = self._with_steps(phase)
        model = rebuild_model(self.config, model, before.plan, phase.plan)
        # Record that the phase before has ended. The data begin anew after a warmup phase.
        progress = replace(state.progress, phase=state.progress.phase + 1, phase_step=0, phase_skipped=0)
        if before.is_warmup:
            progress = replace(progress, start_step=progress.step, start_samples=progress.samples)
        record = state.record.next_phase(measured)
        self._write_phase(phase, progress)
        self.console.log(
            f"phase {before.name} ends at step {progress.step}: {before.plan.describe()} -> "
            f"{phase.plan.describe()}, micro-batch {before.micro_batch_size} -> "
            f"{phase.micro_batch_size}, global batch {phase.global_batch_size}"
            + (f" ({planned})" if planned else "")
            + (f"; {measured}" if measured else "")
        )
        # A method that starts afresh leaves the head out of its state: the head is then as it was loaded.
        tensors = self.head | state.tensors
        return model, phase, replace(state, tensors=tensors, progress=progress, phase=phase.to_dict(), record=record)

    def _finish(self, engine: Engine, phase: Phase, state: TrainState) -> dict[str, Any]:
        """Collective. Evaluate the trained model, export it, write the summary and the report, return the summary."""
        after = None
        if self.evaluator.parts:
            after = self.evaluator(engine.module, self.folder.path / "predictions-after.jsonl")
        exit_if_preempted()
        whole = FULL_MODEL in phase.plan.trained
        untrained = untrained_tensors(base_of(engine.module)) if whole else {}
        engine.close()
        train = self.splits.train
        if isinstance(train, StreamingDataset) and train.skipped.count:
            self.console.log(f"training rows read last: {train.skipped}")
        summary = summarize(
            self.config,
            self.world,
            state.record,
            after,
            self.splits.sizes(self.config.evaluation.split),
            self.context.left_out if phase.plan.active else None,
        )

        def write() -> None:
            folder = self.folder.model if whole else self.folder.adapter
            export(folder, self.context, phase.plan, state.tensors, untrained)
            self.folder.write_json(SUMMARY_FILE, summary)
            keep_only(self.folder.prefix_cache, None)

        run_on_rank_zero(self.world, write)
        if self.config.report and self.world.rank == 0:
            draw_report(self.folder, self.console)
        show_summary(summary, self.folder, self.console)
        return summary

    def _after_step(self, line: dict[str, object], loop: Loop, writer: MetricsLogger) -> None:
        """Collective. Log the step's line, with the validation loss where it is due."""
        training, at = self.config.training, loop.progress.step
        # Counted in the run's own steps: a pilot does not shift them, and its loss says nothing about the run.
        if not loop.phase.is_warmup and self._due(training.eval_every, loop.progress.counted_steps):
            size, world = self.config.evaluation.micro_batch_size, self.world
            line["validation_loss"] = mean_loss(
                loop.engine.module, self.splits.validation, self.context.objective, size, world.rank, world.size
            )
        if self._due(training.log_every, at) or "validation_loss" in line or loop.over():
            run_on_rank_zero(self.world, lambda: writer.write(line))
            self.console.step(line, self._last_step(loop))

    def _stop(self, loop: Loop, writer: MetricsLogger) -> NoReturn:
        """Collective. Close the logs and raise `PreemptionRequested`."""
        if loop.prefix is not None:
            loop.prefix.flush()
        self.console.end()
        run_on_rank_zero(self.world, writer.close)
        raise PreemptionRequested(f"{loop.preempted_by}: saved step {loop.progress.step}")

    def _last_step(self, loop: Loop) -> int:
        """The last step of the phase's schedule."""
        return loop.schedule.last_step(loop.progress, loop.phase.global_batch_size)

    def _with_steps(self, phase: Phase) -> Phase:
        """The phase with `steps` computed from its `epochs`."""
        if phase.epochs is None:
            return phase
        samples = phase.epochs * len(self.data.sequences(phase.subset))
        return replace(phase, steps=max(1, math.ceil(samples / phase.global_batch_size)))

    def _trained(self, plan: AdapterPlan, engine: Engine) -> int:
        """Collective. Number of trained values, without masked ones: adapters and fully trained modules."""
        whole = [name for name in engine.parameters if not is_adapter(name)]
        values = to_compact(plan, engine.values(whole))
        return count_parameters(plan, self.targets) + sum(map(torch.numel, values.values()))

    def _read_state(self, loop: Loop, record: PhaseRecord, before: TrainState) -> TrainState:
        """Collective. The loop's present state, from which a run can continue."""
        return TrainState(
            **loop.engine.state_dict(),
            progress=copy.copy(loop.progress),
            phase=loop.phase.to_dict(),
            callback=loop.callback.to_dict() if loop.callback else None,
            record=before.record.with_current(record),
            callback_tensors=loop.callback.tensors() if loop.callback else {},
        )

    def _save(self, state: TrainState) -> None:
        """Collective. Write the state as a checkpoint."""
        keep = self.config.training.keep_checkpoints
        run_on_rank_zero(self.world, lambda: save_checkpoint(self.folder.checkpoints, state, keep))

    def _write_phase(self, phase: Phase, progress: Progress) -> None:
        """Collective. Write the plan and the phase's file when a phase begins."""
        run_on_rank_zero(self.world, lambda: self.folder.write_json(PLAN_FILE, phase.plan.to_dict()))
        self._write(phase_file(phase, progress, self.targets))

    def _write(self, file: tuple[str, Mapping[str, object]]) -> None:
        """Collective. Write one JSON file, on rank 0."""
        run_on_rank_zero(self.world, lambda: self.folder.write_json(*file))

    def _build_model(self, phase: Phase) -> PeftModel:
        """Collective. Load the base with the phase's adapters, and remember its fresh head."""
        exit_if_preempted()
        self.console.log(f"loading {self.config.model.name}")
        settings = engine_settings(self.config, phase, self.world.size).to_deepspeed()
        model = build_model(self.config, self.context.task_mode, phase.plan, settings)
        self.head = fresh_heads(model, phase.plan)
        return model

    @staticmethod
    def _due(every: int | None, step: int) -> bool:
        return every is not None and step % every == 0
