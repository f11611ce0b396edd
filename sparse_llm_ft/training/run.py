"""`Run`: a sequence of phases. Each one starts from the state that the method made of the phase before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import transformers
from peft import PeftModel

from sparse_llm_ft.checkpoint.record import RunRecord
from sparse_llm_ft.checkpoint.state import Progress, TrainState
from sparse_llm_ft.checkpoint.store import checkpoint_folder, load_checkpoint, newest_state
from sparse_llm_ft.cluster.state_writer import StateWriter
from sparse_llm_ft.config import check_steps
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.data.dataset import Splits
from sparse_llm_ft.data.streaming import StreamingDataset
from sparse_llm_ft.data.training_set import TrainingSet
from sparse_llm_ft.distributed.collectives import (
    ALONE,
    Coordination,
    broadcast_int,
    coordinate,
    run_long_on_rank_zero,
    run_on_every_rank,
    run_on_rank_zero,
)
from sparse_llm_ft.distributed.signals import exit_if_preempted
from sparse_llm_ft.engine.build import build_model, engine_settings, fresh_heads, rebuild_model, untrained_tensors
from sparse_llm_ft.engine.engine import Engine, process_group
from sparse_llm_ft.engine.peak_memory import resident_bytes
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.export.adapter import export
from sparse_llm_ft.export.trial import try_export
from sparse_llm_ft.io.wait import Wait
from sparse_llm_ft.methods.chain import Chain
from sparse_llm_ft.model.architecture import base_of
from sparse_llm_ft.model.loading import check_weights
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import FULL_MODEL
from sparse_llm_ft.planning.batch_size import Peak, first_batch, grown_batch, resumed_batch, settle_growth, shrunk_batch
from sparse_llm_ft.planning.devices import Device, planned_device
from sparse_llm_ft.planning.forecast import budget_peak
from sparse_llm_ft.planning.micro_batch import settle_micro_batch
from sparse_llm_ft.planning.phases import memory_of
from sparse_llm_ft.run_folder import PLAN_FILE, SUMMARY_FILE, RunFolder
from sparse_llm_ft.training.best import NOTHING_WATCHED
from sparse_llm_ft.training.phase_training import PhaseTraining, RunParts
from sparse_llm_ft.training.prefix_store import keep_only
from sparse_llm_ft.training.records import (
    check_samples,
    describe_measurement,
    describe_phase,
    finished_phase_file,
    machine_remarks,
    mask_remarks,
    phase_file,
    record_forecast,
    remarks,
    show_summary,
    summarize,
)
from sparse_llm_ft.training.report_writer import ReportWriter
from sparse_llm_ft.training.schedule import Schedule
from sparse_llm_ft.training.scorer import Scorer
from sparse_llm_ft.training.trackers import Trackers


def train(context: RunContext) -> dict[str, Any]:
    """Collective. Train to the end, from the newest checkpoint if there is one, and return the summary (summary.json).

    A run that is already complete only prints its summary again.

    Raises:
        UserError: the data cannot be used or do not fit the settings; the folder cannot be written or is in use; all
            checkpoints are damaged.
        TrainingError: too many losses are not finite, or no adapter is left.
        PreemptionRequested: a signal asked the run to stop; its state is saved.
    """
    folder, console = context.folder, context.console
    with process_group():
        run = prepared(context)
        if not broadcast_int(int(folder.is_complete())):
            return run.train()
        console.log(f"{folder.path} is complete; nothing to do")
        summary = folder.summary()
        run.report.finish_late()
        show_summary(summary, folder, console)
        return summary


def prepared(context: RunContext) -> Run:
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
        self.run_state = StateWriter(self.folder.path, self.world)
        self.trackers = Trackers(self.config, self.console, self.world.rank)
        draws = self.config.report and self.world.rank == 0
        process_bytes = resident_bytes("VmRSS")  # before the base is loaded
        plan = partial(record_forecast, context, process_bytes)
        self.report = ReportWriter(self.folder, self.console, draws, plan)
        self.parts = RunParts(context, splits, data, schedule, self.run_state, self.trackers, self.report)
        self.best = NOTHING_WATCHED  # in the phase trained last

    @classmethod
    def prepare(cls, context: RunContext, ranks: Coordination = ALONE, device: Device | None = None) -> Run:
        """Collective, as `ranks` says. Read the data, or find them in the cache, and plan the first phase.

        Args:
            device: what each process will compute on; None: as this one.

        Raises:
            UserError: the base has no weights; rows cannot be used; settings do not fit the run's length; batch growth
                is set for a model whose memory cannot be traced.
        """
        context, device = context.dated(ranks.broadcast), device or planned_device(context.config)
        config, task_mode = context.config, context.task_mode
        check_weights(config.model)
        # As at the run's end: on other ranks transformers saves nothing.
        with Wait(context.console, "trying the export"):
            ranks.on_rank_zero(lambda: try_export(context, context.first_phase().plan))
        splits = Splits.encode(config, context.task, context.tokenizer, task_mode, ranks, context.embeddings)
        data = TrainingSet(splits.train, context.task, config.task)
        schedule = Schedule(config.training, data.size)
        check_steps(config, schedule.total_steps)
        first = context.methods(schedule.total_steps).first(context.plan, context.targets)
        config = settle_growth(config, first, task_mode, data.longest, context.console)
        context = replace(context, config=config)
        with Wait(context.console, "planning the micro-batch"):
            config = settle_micro_batch(context, device, ranks)
        context = replace(context, config=config)
        context.folder.check(config, resolved=True)
        # Under a memory budget, the planner decides which adapters may live, and the phases' micro-batches.
        peak = budget_peak(context, on_gpu=device.is_gpu)
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
        with self.trackers.sent_on_error(), self.run_state.recorded():
            return self._train()

    def _train(self) -> dict[str, Any]:
        state, phase = self._begin(self.first)
        self.trackers.begin({} if state is None else state.record.trackers)
        model = self.load_model(phase)
        if state is None:  # a new run: nothing is trained yet
            run, size = RunFolder.identity(self.config), self.config.training.fixed_micro_batch_size
            record = RunRecord(run=run, samples=self.splits.key, micro_batch_size=size)
            state = TrainState({}, {}, {}, Progress(), phase.to_dict(), record=record)
        while True:
            # Train the phase and take its scores; the method makes the next phase from them.
            engine, phase, state = self._train_phase(model, phase, state)
            scores = self.scorer(engine, phase, *self.scored(phase), state.tensors)
            following = self.methods.next(phase, state, scores, self.targets)
            self._write(finished_phase_file(phase, state, scores, following and following[0].plan, self.targets))
            if following is None:
                return self._finish(engine, phase, state)
            # Replace the adapters by the next plan's, around the same base.
            engine.close()
            remarks = (describe_measurement(scores, phase), self.methods.remark(phase, following[0], self.targets))
            measured = "; ".join(filter(None, remarks)) or None
            model, phase, state = self._change_phase(model, phase, *following, measured)

    def scored(self, phase: Phase) -> tuple[Sequence[Any], Sequence[Any]]:
        """The samples that a phase's scores are taken on, and others that the phase trained on."""
        scored = phase.scored
        return self.data.subset(scored), () if scored == phase.subset else self.data.subset(phase.subset)

    def _begin(self, first: Phase) -> tuple[TrainState | None, Phase]:
        """Collective. Take the folder, find the state and phase to begin with, and write the folder's first files."""
        # Find the newest checkpoint; only this process may use the folder from here on.
        run_on_rank_zero(self.world, self.folder.lock)
        run_on_rank_zero(self.world, self.run_state.begin)
        run = RunFolder.identity(self.config)
        with Wait(self.console, "reading the newest checkpoint"):
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
        phase = self.data.with_steps(phase)
        run_on_rank_zero(self.world, lambda: self.folder.begin(self.config, state.logged_step if state else 0))
        self._write_phase(phase, state.progress if state else Progress())
        for line in (*remarks(self.context, self.splits, self.data, first), *machine_remarks(self.config)):
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
            with Wait(self.console, "starting the engine"):
                engine = Engine(model, engine_settings(self.config, phase, self.world.size), phase.plan)
                engine.load_state_dict(state.engine_state)
            if self.evaluator.parts and state.record.before is None and state.progress.step == 0:
                # The first evaluation needs the engine: at stage 3 its hooks gather the weights.
                self.console.log(f"measuring {self.evaluator.count} {self.config.evaluation.split} samples")
                state.record.before = self.evaluator(engine.module, self.folder.path / "predictions-before.jsonl")
            training = PhaseTraining(self.parts, engine, phase, state)
            state, self.best = training.train(), training.best
            # Saved here, so that a run that is killed during the phase change repeats the change.
            self.parts.save(state, self.best.kept_step)
            if not training.loop.out_of_memory:
                return engine, phase, state
            # Continue from the step before, with a new engine around the same model.
            engine.close()
            smaller = shrunk_batch(phase, self.world.size, state.progress.step + 1)
            state = replace(state, phase=smaller.to_dict(), record=state.record.shrunk(smaller.micro_batch_size))
            self.parts.save(state, self.best.kept_step)
            self.console.log(
                f"step {state.progress.step + 1} ran out of memory and is made again: micro-batch "
                f"{phase.micro_batch_size} -> {smaller.micro_batch_size}, global batch {phase.global_batch_size}"
            )
            phase = smaller

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
        phase = self.data.with_steps(phase)
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
        after, exported = None, self._use_best(engine, state)
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
            exported.progress.step,
        )

        def write() -> None:
            folder = self.folder.model if whole else self.folder.adapter
            export(folder, self.context, phase.plan, exported.tensors, untrained)
            self.folder.write_json(SUMMARY_FILE, summary)
            keep_only(self.folder.prefix_cache, None)

        with Wait(self.console, "exporting"):
            run_long_on_rank_zero(self.world, write)
        last = state.progress.step + 1  # behind the last step, whose numbers have been sent
        self.trackers.log(last, {key: part for key, part in summary["metrics"].items() if part})
        self.trackers.close()
        self.report.finish()
        show_summary(summary, self.folder, self.console)
        return summary

    def _use_best(self, engine: Engine, state: TrainState) -> TrainState:
        """Collective. The state to measure and export: the best step's, whose values the engine then has."""
        step, found = self.best.kept_step, []
        if step is None or step == state.progress.step:
            return state
        folder = checkpoint_folder(self.folder.checkpoints, step)

        def read() -> None:
            found.append(load_checkpoint(folder, self.context.expected, RunFolder.identity(self.config)))

        try:
            run_on_every_rank(read, "all nodes must share the file system of output_dir")
        except UserError as error:
            self.console.log(f"the best step cannot be used, and the last one is exported: {error}")
            return state
        engine.load_state_dict(found[0].state.engine_state)
        self.console.log(f"continuing with step {step}: {self.best.describe()}")
        return found[0].state

    def _write_phase(self, phase: Phase, progress: Progress) -> None:
        """Collective. Write the plan and the phase's file when a phase begins."""
        run_on_rank_zero(self.world, lambda: self.folder.write_json(PLAN_FILE, phase.plan.to_dict()))
        self._write(phase_file(phase, progress, self.targets))

    def _write(self, file: tuple[str, Mapping[str, object]]) -> None:
        """Collective. Write one JSON file, on rank 0."""
        run_on_rank_zero(self.world, lambda: self.folder.write_json(*file))

    def load_model(self, phase: Phase) -> PeftModel:
        """Collective. Load the base with the phase's adapters, and remember its fresh head."""
        exit_if_preempted()
        self.console.log(f"loading {self.config.model.name}")
        settings = engine_settings(self.config, phase, self.world.size).to_deepspeed()
        model = build_model(self.config, self.context.task_mode, phase.plan, settings, self.world, self.console)
        self.head = fresh_heads(model, phase.plan)
        return model
