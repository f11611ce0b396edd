"""A run: a sequence of phases, each trained from the state the method made of the one before."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import transformers
from peft import PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase

from sparse_llm_ft.adapters import SparseLoraConfig, find_targets, save_stock_lora
from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.engine import Engine, EngineSettings, check_deepspeed, init_distributed
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.evaluation import mean_loss
from sparse_llm_ft.folders import write_folder
from sparse_llm_ft.methods import Method, Phase, make_method
from sparse_llm_ft.modeling import check_weights, empty_model, load_model, load_tokenizer
from sparse_llm_ft.optim import StoIHT
from sparse_llm_ft.plan import AdapterPlan, Shape
from sparse_llm_ft.progress import Progress
from sparse_llm_ft.state import TrainState
from sparse_llm_ft.training.agreement import from_rank_zero, on_every_rank, on_rank_zero
from sparse_llm_ft.training.batches import check_growth, first_batch, grown_batch, resumed_batch
from sparse_llm_ft.training.checkpoints import checkpoint_folder, newest_valid, save_checkpoint
from sparse_llm_ft.training.display import Display
from sparse_llm_ft.training.loop import Loop, Step
from sparse_llm_ft.training.measure import Measure
from sparse_llm_ft.training.prepare import Prepared
from sparse_llm_ft.training.run_folder import PLAN, SUMMARY
from sparse_llm_ft.training.samples import Samples
from sparse_llm_ft.training.summary import PhaseRecord, show_summary, summarize
from sparse_llm_ft.training.writers import MetricsWriter


def run(prepared: Prepared) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint if there is one; returns the summary (summary.json).

    Every rank calls it. A run that is already complete only shows its summary again.

    Raises:
        UserError: what only model or DeepSpeed show to be wrong, before weights are loaded; a folder that cannot be
            written or is in use; checkpoints that are all damaged.
        TrainingError: a loss that is not finite, or no adapter left.
    """
    config, world, folder = prepared.config, prepared.world, prepared.folder
    transformers.utils.logging.disable_progress_bar()  # every rank would draw its own
    display = Display(world.rank)
    check_deepspeed(config.deepspeed.extra)
    targets = find_targets(empty_model(config.model, config.model.attn_implementation), config.adapter.target_modules)
    method = make_method(config)
    first = first_batch(method.first(targets), config)
    check_growth(config, first)
    tokenizer = load_tokenizer(config.model)
    check_weights(config.model)
    samples = Samples.encode(prepared, tokenizer)
    init_distributed()
    if from_rank_zero(int(folder.is_complete())):
        display.say(f"{folder.path} is complete; nothing to do")
        summary = folder.summary()
        show_summary(summary, folder, display)
    else:
        summary = Run(prepared, display, targets, method, tokenizer, samples).train(first)
    dist.destroy_process_group()
    return summary


class Run:
    """What stays the same from phase to phase: data, tokenizer, frozen base, folder."""

    def __init__(
        self,
        prepared: Prepared,
        display: Display,
        targets: dict[str, Shape],
        method: Method,
        tokenizer: PreTrainedTokenizerBase,
        samples: Samples,
    ) -> None:
        self.config: RunConfig = prepared.config
        self.world, self.folder, self.schedule = prepared.world, prepared.folder, prepared.schedule
        self.display, self.targets, self.method = display, targets, method
        self.samples, self.tokenizer = samples, tokenizer
        self.measure = Measure(
            self.config.evaluation,
            prepared.measured,
            samples.measured,
            tokenizer,
            self.world,
            self.config.deepspeed.zero_stage,
        )

    def train(self, first: Phase) -> dict[str, Any]:
        """All phases, then the final measurement, the adapter and the summary."""
        state, phase = self._begin(first)
        model = self._build_model(phase.plan)
        if state is None:
            record: dict[str, Any] = {
                "before": None,
                "phases": [],
                "micro_batch_size": self.config.training.micro_batch_size,
            }
            state = TrainState({}, {}, {}, Progress(), phase.to_dict(), record=record)
            if self.measure.samples:
                self.display.say(f"measuring {len(self.measure.samples)} {self.config.evaluation.split} samples")
                state.record["before"] = self.measure(model, self.folder.path / "predictions-before.jsonl")
        while True:
            engine, state = self._train_phase(model, phase, state)
            following = self.method.next(phase, state, self.targets)
            if following is None:
                return self._finish(engine, phase, state)
            engine.close()
            phase, state = self._change_phase(model, phase, *following)

    def _begin(self, first: Phase) -> tuple[TrainState | None, Phase]:
        """Take the folder, find where to begin, and write what a folder holds from the start."""
        on_rank_zero(self.world, self.folder.lock)
        state = self._newest_state()
        phase = first
        if state is not None:
            configured = self.config.training.micro_batch_size
            anew = configured if configured != state.record["micro_batch_size"] else None
            state.record["micro_batch_size"] = configured
            phase = resumed_batch(Phase.from_dict(state.phase), self.world.size, anew)
        on_rank_zero(self.world, lambda: self.folder.begin(self.config, state.progress.step if state else 0))
        self._write_plan(phase.plan)
        if self.samples.shortened:
            self.display.say(
                f"{self.samples.shortened} of {len(self.samples.train)} training prompts were shortened to fit "
                f"task.max_length {self.config.task.max_length}"
            )
        return state, phase

    def _train_phase(self, model: PeftModel, phase: Phase, state: TrainState) -> tuple[Engine, TrainState]:
        """Train one phase to its end; returns its engine and the state there, which is also its last checkpoint."""
        engine = Engine(model, self._engine_settings(phase))
        engine.load(state.tensors, state.moments, state.optimizer_steps)
        rule = StoIHT.from_dict(phase.cut, state.rule) if phase.cut else None
        progress = copy.copy(state.progress)
        loop = Loop(
            engine,
            phase,
            rule,
            self.samples.train,
            self.tokenizer.pad_token_id,
            self.schedule,
            progress,
            self.world,
            self.config.seed,
        )
        record = PhaseRecord.of(
            phase, state.record, sum(map(torch.numel, engine.values().values())), engine.optimizer_bytes()
        )
        writer = MetricsWriter(self.folder, self.world.rank, progress.step)
        total = self.schedule.last_step(progress, phase.global_batch_size)
        self.display.begin(phase.name, progress.step, total)
        for step in loop.steps():
            record.add(step, phase)
            self._after_step(step, loop, record, writer)
            if self._due(self.config.training.save_every, progress.step) and not loop.over():
                self._save(self._read_state(loop, record, state))
        self.display.end()
        writer.close()
        state = self._read_state(loop, record, state)
        self._save(state)
        return engine, state

    def _change_phase(
        self, model: PeftModel, before: Phase, phase: Phase, state: TrainState
    ) -> tuple[Phase, TrainState]:
        """Put the new plan on the model, around the same frozen base."""
        length = max(len(s.prompt) + len(s.completion) for s in self.samples.train)
        phase = grown_batch(phase, before, self.config, self.targets, length, self.world.size)
        grown = phase.micro_batch_size > before.micro_batch_size
        torch.manual_seed(self.config.seed)
        model.base_model.set_plan(phase.plan)
        progress = replace(state.progress, phase=state.progress.phase + 1, phase_step=0)
        finished = [*state.record["phases"], state.record["current"]]
        record = {key: value for key, value in state.record.items() if key != "current"} | {"phases": finished}
        self._write_plan(phase.plan)
        self.display.say(
            f"phase {before.name} ends at step {progress.step}: {len(before.plan.active)} adapters -> "
            f"{len(phase.plan.active)}, micro-batch {before.micro_batch_size} -> "
            f"{phase.micro_batch_size}, global batch {phase.global_batch_size}"
            + (" (no larger micro-batch both fits and divides)" if phase.batch_growth != "none" and not grown else "")
        )
        return phase, replace(state, progress=progress, phase=phase.to_dict(), record=record)

    def _finish(self, engine: Engine, phase: Phase, state: TrainState) -> dict[str, Any]:
        """Measure the trained adapter, export it, write the summary."""
        after = None
        if self.measure.samples:
            after = self.measure(engine.module, self.folder.path / "predictions-after.jsonl")
        engine.close()
        summary = summarize(self.config, self.world, state.record, after)

        def write() -> None:
            model = self.config.model
            write_folder(
                self.folder.adapter,
                lambda path: save_stock_lora(path, phase.plan, state.tensors, model.name, model.revision),
            )
            self.folder.write_json(SUMMARY, summary)

        on_rank_zero(self.world, write)
        show_summary(summary, self.folder, self.display)
        return summary

    def _after_step(self, step: Step, loop: Loop, record: PhaseRecord, writer: MetricsWriter) -> None:
        training, at = self.config.training, loop.progress.step
        line = record.line(step, loop)
        if self._due(training.eval_every, at):
            line["validation_loss"] = mean_loss(
                loop.engine.module,
                self.samples.validation,
                self.tokenizer.pad_token_id,
                self.config.evaluation.micro_batch_size,
                self.world.rank,
                self.world.size,
            )
        if self._due(training.log_every, at) or "validation_loss" in line or loop.over():
            writer.write(line)
            self.display.step(line, self.schedule.last_step(loop.progress, loop.phase.global_batch_size))

    def _read_state(self, loop: Loop, record: PhaseRecord, before: TrainState) -> TrainState:
        return TrainState(
            loop.engine.values(),
            loop.engine.moments(),
            loop.engine.optimizer_steps(),
            copy.copy(loop.progress),
            loop.phase.to_dict(),
            loop.rule.to_dict() if loop.rule else None,
            {**before.record, "current": record.to_dict()},
        )

    def _save(self, state: TrainState) -> None:
        keep = self.config.training.keep_checkpoints
        on_rank_zero(self.world, lambda: save_checkpoint(self.folder.checkpoints, state, keep))

    def _newest_state(self) -> TrainState | None:
        """The newest valid checkpoint. Rank 0 chooses, so that all ranks continue from the same one."""
        chosen = -1

        def choose() -> None:
            nonlocal chosen
            newest, complaints = newest_valid(self.folder.checkpoints)
            if newest is None and complaints:
                raise UserError(
                    f"no checkpoint can be used ({complaints[0].rpartition(';')[0]}); "
                    f"to start anew, choose another output_dir than {self.folder.path}"
                )
            for complaint in complaints:
                self.display.say(complaint)
            chosen = int(newest.name.removeprefix("step-")) if newest else -1

        on_rank_zero(self.world, choose)
        step = from_rank_zero(chosen)
        if step < 0:
            return None
        self.display.say(f"resuming from step {step}")
        states: list[TrainState] = []
        folder = checkpoint_folder(self.folder.checkpoints, step)
        on_every_rank(
            lambda: states.append(TrainState.load(folder)), "all nodes must share the file system of output_dir"
        )
        return states[0]

    def _write_plan(self, plan: AdapterPlan) -> None:
        on_rank_zero(self.world, lambda: self.folder.write_json(PLAN, plan.to_dict()))

    def _build_model(self, plan: AdapterPlan) -> PeftModel:
        self.display.say(f"loading {self.config.model.name}")
        base = load_model(self.config.model)
        torch.manual_seed(self.config.seed)  # the same fresh adapters on every rank
        model = get_peft_model(base, SparseLoraConfig(plan=plan, task_type="CAUSAL_LM"))
        assert isinstance(model, PeftModel)
        return model

    def _engine_settings(self, phase: Phase) -> EngineSettings:
        config = self.config
        return EngineSettings(
            zero_stage=config.deepspeed.zero_stage,
            dtype=config.model.dtype,
            micro_batch_size=phase.micro_batch_size,
            accumulation_steps=phase.global_batch_size // (phase.micro_batch_size * self.world.size),
            max_grad_norm=config.training.max_grad_norm,
            weight_decay=config.training.weight_decay,
            omega_lr=phase.omega_lr,
            omega_algorithm=phase.omega_algorithm,
            extra=config.deepspeed.extra,
        )

    @staticmethod
    def _due(every: int | None, step: int) -> bool:
        return every is not None and step % every == 0
