"""The phases of a run before anything is measured, with their batch sizes and lengths."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.config.types import MAX_BATCH
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan
from sparse_llm_ft.planning.batch_size import Peak, first_batch, grown_batch
from sparse_llm_ft.planning.derivations import known_derivation
from sparse_llm_ft.planning.samples import SampleSizes


@dataclass(frozen=True)
class ForeseenPhase:
    """A phase that a run will have, if what it measures is as assumed.

    Attributes:
        phase: with its batch sizes.
        assumption: in words; empty for the first phase, which assumes nothing.
        steps: optimizer steps; None if they depend on data that are not known.
    """

    phase: Phase
    assumption: str
    steps: int | None


MOST_PHASES = 16
"""No method has so many; a method of another package might foresee for ever."""


def memory_of(config: RunConfig, peak: Peak | None) -> Callable[[AdapterPlan], int] | None:
    """`MethodInputs.memory`: a plan's peak at the configured micro-batch."""
    if peak is None:
        return None
    training = config.training

    def planned(plan: AdapterPlan) -> int:
        return peak(Phase("train", plan).with_batch(training.fixed_micro_batch_size, training.global_batch_size))

    return planned


def foresee_phases(
    context: RunContext, world_size: int, samples: SampleSizes, peak: Peak | None = None
) -> tuple[ForeseenPhase, ...]:
    """Follow the run's methods from the first phase to the last, see `Method.foresee`.

    Args:
        peak: where a method has a memory budget.
    """
    config, total = context.config, _total_steps(context, samples)
    chain = context.methods(total or MAX_BATCH, memory_of(config, peak), partial(known_derivation, context))
    phase = first_batch(chain.first(context.plan, context.targets), config, world_size, peak)
    found, assumption, counted = list[ForeseenPhase](), "", 0
    for _ in range(MOST_PHASES):
        steps = _steps(phase, total, counted, config.training.global_batch_size, samples)
        found.append(ForeseenPhase(phase, assumption, steps))
        if steps is not None and not phase.is_warmup:
            counted += steps * phase.global_batch_size
        following = chain.foresee(phase, context.targets)
        if following is None:
            break
        after, assumption = following
        phase, _ = grown_batch(
            after,
            phase,
            config,
            context.targets,
            samples.longest,
            world_size,
            context.task_mode,
            context.expected.parameters,
            peak,
        )
    return tuple(found)


def _total_steps(context: RunContext, samples: SampleSizes) -> int | None:
    training = context.config.training
    if training.max_steps is not None:
        return training.max_steps
    if samples.count is None:
        return None
    return math.ceil(math.ceil(training.epochs * samples.count) / training.global_batch_size)


def _steps(phase: Phase, total: int | None, counted: int, initial: int, samples: SampleSizes) -> int | None:
    """A phase's optimizer steps.

    Args:
        counted: samples of the counted phases before.
        initial: the run's global batch at its beginning.
    """
    if phase.steps is not None:
        return phase.steps
    if phase.epochs is not None:
        if samples.count is None:
            return None
        part = phase.subset.fraction if phase.subset is not None and phase.subset.fraction is not None else None
        if part is None:
            return None
        return math.ceil(phase.epochs * max(1, round(part * samples.count)) / phase.global_batch_size)
    if total is None:
        return None
    return math.ceil(max(0, total * initial - counted) / phase.global_batch_size)
