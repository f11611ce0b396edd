"""The largest or smallest value of one setting with which a run fits into a device's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sparse_llm_ft.config import RunConfig, parse_config
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.errors import ConfigError, UserError
from sparse_llm_ft.model.limits import positions
from sparse_llm_ft.plan import MAX_RANK, uniform_plan
from sparse_llm_ft.planning.forecast import forecast
from sparse_llm_ft.planning.samples import SampleSizes

_SHORTEST, _LONGEST = 8, 2**20
"""Tokens: the least that ``task.max_length`` allows, and the most for a model without a limit."""


@dataclass(frozen=True)
class Solution:
    """The answer for one setting.

    Attributes:
        value: the best value that fits; None: none does.
        peak: bytes that the run then needs on each device.
        beyond: the next value, which does not fit; None: there is none.
        beyond_peak: bytes that it would need.
    """

    field: str
    value: int | None
    peak: int | None
    beyond: int | None
    beyond_peak: int | None


@dataclass(frozen=True)
class _Question:
    """Values in the order of the memory that they need, the least first, and what each needs."""

    values: Sequence[int]
    peak: Callable[[int], int]


def solve(
    field: str, context: RunContext, memory: int, samples: SampleSizes, on_gpu: bool, gpus_per_node: int = 1
) -> Solution:
    """Search the values of a setting, with all others as in `context.config`. Not a collective.

    Args:
        field: micro_batch_size, max_length, r or keep, of which the largest value is wanted; nodes or zero_stage, of
            which the smallest is.
        memory: bytes of one device.
        gpus_per_node: of each node, for ``nodes``.

    Raises:
        UserError: this run has no such setting.
        Exception: the model cannot be traced on the meta device, for any reason.
    """
    question = _question(field, _without_growth(context), samples, on_gpu, gpus_per_node)
    peaks: dict[int, int] = {}

    def peak(index: int) -> int:
        value = question.values[index]
        if value not in peaks:
            peaks[value] = question.peak(value)
        return peaks[value]

    if field == "zero_stage":  # a stage need not need less than the one below it
        fitting = next((at + 1 for at in reversed(range(len(question.values))) if peak(at) <= memory), 0)
    else:
        fitting = _search(question.values, peak, memory)
    value = question.values[fitting - 1] if fitting else None
    beyond = question.values[fitting] if fitting < len(question.values) else None
    of_value, of_beyond = (None if which is None else peaks[which] for which in (value, beyond))
    return Solution(field, value, of_value, beyond, of_beyond)


def _search(values: Sequence[int], peak: Callable[[int], int], memory: int) -> int:
    """How many of the values fit, of which the first ones do.

    Memory is nearly linear in most settings, so the next try is where a line between the nearest two would meet the
    limit; every third one halves the distance, in case it is not.

    Args:
        peak: index -> bytes.
    """
    fits, beyond = 0, len(values) - 1
    if not values or peak(fits) > memory:
        return 0
    if peak(beyond) <= memory:
        return len(values)
    tries = 0
    while beyond - fits > 1:
        share = (memory - peak(fits)) / (peak(beyond) - peak(fits)) if tries % 3 < 2 else 0.5
        wanted = values[fits] + share * (values[beyond] - values[fits])
        at = next(
            i for i in range(fits, beyond + 1) if i == beyond or abs(values[i + 1] - wanted) >= abs(values[i] - wanted)
        )
        at = min(max(at, fits + 1), beyond - 1)
        fits, beyond, tries = (at, beyond, tries + 1) if peak(at) <= memory else (fits, at, tries + 1)
    return fits + 1


def _without_growth(context: RunContext) -> RunContext:
    """The run without batch growth: a grown batch needs no more than the phase before it."""
    methods = tuple(method.without_growth() for method in context.config.method)
    return replace(context, config=context.config.model_copy(update={"method": methods}))


def _question(field: str, context: RunContext, samples: SampleSizes, on_gpu: bool, gpus_per_node: int) -> _Question:
    config = context.config

    def peak(changed: RunConfig, ranks: int | None = None, sizes: SampleSizes = samples) -> int:
        return forecast(replace(context, config=changed), ranks, sizes, on_gpu).peak_bytes

    if field == "micro_batch_size":
        share = config.training.global_batch_size // context.world.size
        sizes = [size for size in range(1, share + 1) if share % size == 0]
        return _Question(sizes, lambda size: peak(_changed(config, "training", micro_batch_size=size)))
    if field == "max_length":
        limit = positions(context.empty.config.get_text_config()) or _LONGEST
        least = max(_SHORTEST, (config.task.max_prompt_length or 0) + 1)
        return _Question(
            range(least, limit + 1),
            lambda length: peak(_changed(config, "task", max_length=length), sizes=SampleSizes.assumed(length)),
        )
    if field == "r":

        def ranked(r: int) -> int:
            old, adapter = context.plan, config.adapter
            plan = uniform_plan(context.targets, r, adapter.lora_alpha, adapter.lora_dropout, old.trained)
            plan = replace(plan, rows=old.rows)
            changed = replace(context, config=_changed(config, "adapter", r=r), plan=plan)
            return forecast(changed, samples=samples, on_gpu=on_gpu).peak_bytes

        widest = max((min(shape) for shape in context.targets.values()), default=1)
        return _Question(range(1, min(MAX_RANK, widest) + 1), ranked)
    if field == "keep":
        return _kept(context, peak)
    if field == "nodes":
        each = config.training.fixed_micro_batch_size * gpus_per_node
        most = config.training.global_batch_size // each
        counts = [n for n in range(most, 0, -1) if config.training.global_batch_size % (n * each) == 0]
        return _Question(counts, lambda nodes: peak(config, nodes * gpus_per_node))
    if field == "zero_stage":
        stages = {stage: _changed(config, "deepspeed", zero_stage=stage) for stage in (3, 2, 1, 0)}
        return _Question([s for s, changed in stages.items() if _allowed(changed)], lambda s: peak(stages[s]))
    raise ValueError(f"{field} cannot be solved for")


def _kept(context: RunContext, peak: Callable[[RunConfig], int]) -> _Question:
    methods = context.config.method
    at = next((i for i, method in enumerate(methods) if "keep" in type(method).model_fields), None)
    if at is None:
        raise UserError(
            f"--solve keep: {context.config.method_name} has no method.keep; expected weight_lora or another"
        )

    def changed(keep: int) -> RunConfig:
        kept = methods[at].model_copy(update={"keep": keep})
        return context.config.model_copy(update={"method": (*methods[:at], kept, *methods[at + 1 :])})

    return _Question(range(1, len(context.targets) + 1), lambda keep: peak(changed(keep)))


def _changed(config: RunConfig, section: str, **values: object) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _allowed(config: RunConfig) -> bool:
    """Whether the run's other settings go with this stage."""
    try:
        parse_config(config.model_dump(mode="json"))
    except ConfigError:
        return False
    return True
