"""What a run will need, phase by phase, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sparse_llm_ft.adapters import count_parameters
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.engine.build import engine_settings
from sparse_llm_ft.engine.evaluation_trace import EvaluationBytes, Generation
from sparse_llm_ft.engine.gathers import Gathers, simulate
from sparse_llm_ft.engine.rank_bytes import Inventory, RankBytes, rank_bytes, zero_settings
from sparse_llm_ft.engine.step_trace import Batch, StepTrace, gathered_alone
from sparse_llm_ft.model.causal_mask import gets_mask
from sparse_llm_ft.model.flops import lowest_layer, model_flops
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import FULL_MODEL
from sparse_llm_ft.planning.batch_size import Peak
from sparse_llm_ft.planning.communication import communicated_bytes
from sparse_llm_ft.planning.peaks import TrainedBytes, sharded_reading
from sparse_llm_ft.planning.phases import ForeseenPhase, foresee_phases
from sparse_llm_ft.planning.samples import SampleSizes, sample_sizes
from sparse_llm_ft.planning.traces import cached_evaluation, cached_model, cached_trace

GIB = 2**30


@dataclass(frozen=True)
class DeviceOverhead:
    """What a device holds beside tensors. These are assumptions, not measurements; docs/planning.md says why these.

    Attributes:
        context: bytes of the driver's context and the libraries' kernels and workspaces.
        collectives: bytes of NCCL's buffers, with more than one rank.
        reserve: share of a step's tensors that the caching allocator holds beyond them.
    """

    context: int = GIB // 2
    collectives: int = GIB // 2
    reserve: float = 0.05

    def of(self, tensors: int, ranks: int) -> int:
        """Bytes beside `tensors` bytes of a step's own."""
        return self.context + (self.collectives if ranks > 1 else 0) + round(self.reserve * tensors)


NO_DEVICE = DeviceOverhead(0, 0, 0.0)
"""On a CPU, whose allocator keeps nothing."""


@dataclass(frozen=True)
class PhaseForecast:
    """One phase of a run, on the rank that needs most.

    Attributes:
        name: the phase's.
        assumption: what was assumed about earlier phases' measurements; empty for the first phase.
        plan: what it trains, for people.
        trainable: values that it trains.
        micro_batch_size, global_batch_size, accumulation_steps: see `Phase`.
        lines: name -> bytes. Those of a step are each line's own largest value, and need not come at one time: the
            peak is followed in time, and is not their sum.
        peaks: of ``load`` (0 in later phases, which load nothing), ``step``, ``change`` (to the next phase; 0 in the
            last one), ``save``, ``evaluate``: bytes.
        flops_per_step: of all ranks, model arithmetic without what checkpointing computes twice; None where unknown.
        communicated_bytes_per_step: of one rank; see planning/communication.py.
        steps: optimizer steps; None if the length of the data is not known.
        offloaded: bytes in the host's memory, of optimizer state.
        generation: peak while an evaluation generates texts, which ``evaluate`` contains; 0 if none does.
    """

    name: str
    assumption: str
    plan: str
    trainable: int
    micro_batch_size: int
    global_batch_size: int
    accumulation_steps: int
    lines: Mapping[str, int]
    peaks: Mapping[str, int]
    flops_per_step: float | None
    communicated_bytes_per_step: int
    steps: int | None
    offloaded: int = 0
    generation: int = 0

    @property
    def peak_bytes(self) -> int:
        """The largest of `peaks`."""
        return max(self.peaks.values())

    @property
    def highest(self) -> str:
        """Which of `peaks` is the largest."""
        return max(self.peaks, key=lambda name: self.peaks[name])


@dataclass(frozen=True)
class RunForecast:
    """All phases of a run.

    Attributes:
        samples: the sizes that were planned for.
        notes: what a reader must know, one line each.
    """

    phases: tuple[PhaseForecast, ...]
    world_size: int
    samples: SampleSizes
    notes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The largest peak of all phases."""
        return self.highest.peak_bytes

    @property
    def highest(self) -> PhaseForecast:
        """The phase with the largest peak."""
        return max(self.phases, key=lambda phase: phase.peak_bytes)

    def fits(self, memory: int) -> bool:
        """Whether every phase fits into `memory` bytes of each device."""
        return self.peak_bytes <= memory


def forecast(
    context: RunContext,
    world_size: int | None = None,
    samples: SampleSizes | None = None,
    on_gpu: bool = True,
    overhead: DeviceOverhead | None = None,
    phases: tuple[ForeseenPhase, ...] | None = None,
) -> RunForecast:
    """Forecast every phase of the run that `context` opened. Not a collective; needs no weights and no process group.

    Micro-batch, lengths and stage are those of `context.config`; a search varies them with `dataclasses.replace` and
    `model_copy`. Traces are kept, so a second forecast with the same plans, micro-batch and length takes no time.

    Args:
        world_size: None: the context's.
        samples: None: those of the cache, or assumed ones.
        on_gpu: False plans the CPU's step.
        overhead: None: the assumed one on a GPU, nothing on a CPU.
        phases: None: as foreseen.

    Raises:
        Exception: the model cannot be traced on the meta device, for any reason.
    """
    ranks = context.world.size if world_size is None else world_size
    samples = sample_sizes(context) if samples is None else samples
    overhead = overhead or (DeviceOverhead() if on_gpu else NO_DEVICE)
    if phases is None:
        phases = foresee_phases(context, ranks, samples, budget_peak(context, ranks, samples, on_gpu, overhead))
    planners = [
        _PhasePlanner(context, ranks, samples, on_gpu, overhead, one, first=i == 0) for i, one in enumerate(phases)
    ]
    following = [*planners[1:], None]
    done = tuple(planner.forecast(after) for planner, after in zip(planners, following, strict=True))
    notes = []
    if not samples.known:
        notes.append(
            f"the samples are not tokenised yet: planned for {samples.longest} tokens each (task.max_length), "
            "all of which have a loss"
        )
    return RunForecast(done, ranks, samples, tuple(notes))


def budget_peak(
    context: RunContext,
    world_size: int | None = None,
    samples: SampleSizes | None = None,
    on_gpu: bool = True,
    overhead: DeviceOverhead | None = None,
) -> Peak | None:
    """What plans a phase under ``method.budget.memory``; None where no method has one. Arguments as of `forecast`."""
    if context.config.memory_budget is None:
        return None
    sizes = sample_sizes(context) if samples is None else samples

    def peak(phase: Phase) -> int:
        alone = (ForeseenPhase(phase, "", None),)
        return forecast(context, world_size, sizes, on_gpu, overhead, alone).peak_bytes

    return peak


@dataclass(frozen=True)
class _PhasePlanner:
    context: RunContext
    ranks: int
    samples: SampleSizes
    on_gpu: bool
    overhead: DeviceOverhead
    foreseen: ForeseenPhase
    first: bool

    @property
    def phase(self) -> Phase:
        return self.foreseen.phase

    @property
    def stage(self) -> int:
        return self.context.config.deepspeed.zero_stage

    @property
    def batch(self) -> Batch:
        """The largest micro-batch: padded to the longest sample."""
        config, size = self.context.config, self.phase.micro_batch_size
        longest = self.samples.longest
        # Nothing predicts a sequence's first token.
        supervised = longest - 1 if self.context.task_mode.mode == "causal_lm" else None
        padded = size > 1 and not self.samples.equal
        masked = gets_mask(self.context.empty, config.model, longest, padded, config.task.packing)
        return Batch(size, longest, supervised, masked)

    @cached_property
    def trace(self) -> StepTrace:
        context = self.context
        return cached_trace(context.config.model, self.phase.plan, self.batch, context.task_mode, self.on_gpu)

    @cached_property
    def held(self) -> RankBytes:
        return rank_bytes(self.model, self.phase.plan, self.settings, self.ranks)

    @cached_property
    def model(self) -> Any:
        return cached_model(self.context.config.model, self.phase.plan, self.context.task_mode)

    @cached_property
    def settings(self) -> Any:
        return engine_settings(self.context.config, self.phase, self.ranks)

    @cached_property
    def inventory(self) -> Inventory:
        return Inventory.of(self.model)

    @cached_property
    def gathers(self) -> Gathers:
        """At stage 3; nothing at others."""
        if self.stage < 3:
            nothing = (0,) * len(self.trace.uses)
            return Gathers(0, 0, 0, nothing, nothing)
        trained = sum(w.numel for w in self.inventory.weights.values() if w.trained)
        config = zero_settings(self.settings, trained)
        alone = config.offload_param is None and config.zero_hpz_partition_size == 1
        tables = gathered_alone(self.model) if alone else {}
        return simulate(self.trace, self.inventory.weights, config, self.ranks, tables)

    @cached_property
    def evaluation(self) -> EvaluationBytes:
        context = self.context
        evaluation, task = context.config.evaluation, context.config.task
        generation = None
        generates = context.task_mode.mode == "causal_lm" and context.task.labels is None
        if generates and evaluation.samples:
            prompt = task.max_prompt_length or 3 * task.max_length // 4
            generation = Generation(prompt, evaluation.max_new_tokens, evaluation.num_beams)
        size, longest = evaluation.micro_batch_size, self.samples.longest
        batch = Batch(size, longest, None, gets_mask(context.empty, context.config.model, longest, size > 1))
        return cached_evaluation(
            context.config.model, self.phase.plan, batch, context.task_mode, generation, self.on_gpu
        )

    def forecast(self, after: _PhasePlanner | None) -> PhaseForecast:
        """The phase's, with the change to the phase `after`."""
        phase, held, trace = self.phase, self.held, self.trace
        config = self.context.config
        accumulation = phase.global_batch_size // (phase.micro_batch_size * self.ranks)
        static = held.base + held.adapters + held.optimizer
        guarded = config.training.on_oom == "shrink"
        passes, averaging = self._passes(accumulation, guarded), self.trained.averaging(guarded)
        overhead, beside = self.overhead.of(passes, self.ranks), self.overhead.of(0, self.ranks)
        idle = static + (held.gradients + held.buckets if self.stage == 3 else 0)
        measures = config.evaluation.samples or config.training.eval_every is not None
        evaluated = self._evaluation() if measures else (0, 0)
        loss, generation = (idle + found + overhead if found else 0 for found in evaluated)
        peaks = {
            "load": self._load() + beside if self.first else 0,
            "step": static + max(passes, held.gradients + held.update, averaging) + overhead,
            "change": 0 if after is None else held.base + self._change(after) + beside,
            "save": idle + self.trained.reading(self.on_gpu) + beside,
            "evaluate": max(loss, generation),
        }
        lines = {
            "base": held.base,
            "adapters": held.adapters,
            "gradients": held.gradients,
            "optimizer": held.optimizer,
            "kept_for_backward": trace.kept,
            "logits_and_loss": trace.head,
            "dequantisation": self._dequantised(),
            "gathered_weights": self.gathers.most,
            "communication_buckets": held.buckets,
            "device_overhead": overhead,
        }
        return PhaseForecast(
            phase.name,
            self.foreseen.assumption,
            phase.plan.describe(),
            self._trainable(),
            phase.micro_batch_size,
            phase.global_batch_size,
            accumulation,
            lines,
            peaks,
            self._flops(),
            self._communicated(accumulation),
            self.foreseen.steps,
            held.offloaded,
            generation,
        )

    def _passes(self, accumulation: int, guarded: bool) -> int:
        """The most bytes of both passes beside what is always there: a step's tensors, gathered weights, gradients."""
        uses = zip(self.trace.uses, self.gathers.during, self.gathers.after, strict=True)
        return max(
            self.trained.gradients_during(use, accumulation > 1, guarded) + max(use.now + during, use.peak + after)
            for use, during, after in uses
        )

    def _load(self) -> int:
        """The base as it is read, and the first engine. A run that resumes has its checkpoint too, as a save has."""
        built = self.held.base + self.trained.building()
        if self.stage == 3 and self.ranks > 1:
            return max(built, sharded_reading(self.inventory.weights, self.ranks, self.trained.item))
        return max(built, self.held.base + self._dequantised())

    def _change(self, after: _PhasePlanner) -> int:
        """Beside the base: this phase's engine ends, and its adapters give way to those of `after` and their engine."""
        of_state, of_next = (0 if self.on_gpu else phase.trained.state for phase in (self, after))
        replaced = max(self.trained.item * self.trained.count, 4 * after.trained.count)
        return max(self.trained.closing() + of_state, replaced + of_state, after.trained.building() + of_next)

    @cached_property
    def trained(self) -> TrainedBytes:
        return TrainedBytes.of(self.model, self.settings, self.held)

    def _evaluation(self) -> tuple[int, int]:
        """Beside what is always there: of a loss, and of generating texts; 0 if none are.

        At stage 3 a forward pass gathers weights as a step's does, and what it keeps for a backward pass stays. A
        generation has most at a layer, or where the embedding or the head is gathered beside the cache.
        """
        found, gathers = self.evaluation, self.gathers
        forward = [use.backward for use in self.trace.uses].count(False)
        ahead = max((*gathers.during[:forward], *gathers.after[:forward]), default=0)
        generation = max(found.generation + gathers.kept, found.cache + ahead) if found.generation else 0
        return found.loss + ahead, generation

    def _dequantised(self) -> int:
        if self.context.config.model.quantization == "none":
            return 0
        states = [getattr(p, "quant_state", None) for p in self.model.parameters()]
        return max((s.shape.numel() * s.dtype.itemsize for s in states if s is not None), default=0)

    def _trainable(self) -> int:
        plan, targets = self.phase.plan, self.context.targets
        parameters = self.context.expected.parameters
        count = count_parameters(plan, targets)
        for name, shape in parameters.items():
            if any(not module or name.startswith(f"{module}.") for module in plan.trained):
                rows = plan.rows.get(name.removesuffix(".weight"))
                size = 1
                for side in shape:
                    size *= side
                count += size if rows is None else len(rows.indices) * shape[1]
        return count

    def _flops(self) -> float | None:
        plan, samples, size = self.phase.plan, self.samples, self.phase.global_batch_size
        sizes = model_flops(self.context.empty)
        if sizes is None:
            return size * self.context.cost.of(plan, self.context.targets)
        tokens = round(size * samples.mean)
        adapters = 6.0 * tokens * sum(a.matrices(self.context.targets[n]) for n, a in plan.active.items())
        lowest = lowest_layer(self.context.empty, plan)
        whole = FULL_MODEL in plan.trained
        return adapters + sizes.step(tokens, size * samples.mean_square, size * samples.supervised, lowest, whole)

    def _communicated(self, accumulation: int) -> int:
        return communicated_bytes(
            self.phase, self.model, self.settings, self.held, self.inventory, self.gathers, self.ranks, accumulation
        )
