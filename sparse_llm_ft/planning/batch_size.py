"""A phase's batch sizes, from the settings, the freed memory and the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from sparse_llm_ft.adapters.tuners import TensorShape
from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.config.types import MAX_BATCH
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.engine.memory import grown_micro_batch, state_bytes
from sparse_llm_ft.errors import ConfigError, OutOfMemoryConfigError, reason_of
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import Shape
from sparse_llm_ft.planning.traces import cached_step_bytes


def largest_micro_batch(global_batch_size: int, world_size: int, limit: int) -> int:
    """The largest micro-batch, at most `limit`, that divides the global batch equally among `world_size` ranks.

    Raises:
        ConfigError: no micro-batch does.
    """
    for size in range(limit, 0, -1):
        if global_batch_size % (size * world_size) == 0:
            return size
    raise ConfigError(
        "training.global_batch_size",
        f"{global_batch_size} is not a multiple of the {world_size} processes",
        f"expected a multiple of {world_size}",
    )


def nearest_global_batch(global_batch_size: int, world_size: int, micro: int, limit: int) -> tuple[int, int] | None:
    """The global batch nearest to `global_batch_size` for which both `micro` and a larger micro-batch divide, and the
    largest such micro-batch up to `limit`; None if `limit` is not above `micro`.
    """
    found = [
        (abs(size - global_batch_size), -larger, size)
        for larger in range(micro + 1, limit + 1)
        for unit in (math.lcm(micro, larger) * world_size,)
        for size in (global_batch_size // unit * unit, -(-global_batch_size // unit) * unit)
        if 0 < size <= MAX_BATCH
    ]
    if not found:
        return None
    _, larger, size = min(found)
    return size, -larger


def settle_growth(config: RunConfig, first: Phase, task_mode: TaskMode, length: int, console: Console) -> RunConfig:
    """The settings without batch growth, if the model's memory cannot be traced and growth is on by default alone.

    Args:
        first: the run's first phase.
        length: tokens of the longest training sample.

    Raises:
        ConfigError: the user asked for batch growth; with the reason.
    """
    growing = [method for method in config.method if method.grows_batch]
    if not growing:
        return config
    try:
        cached_step_bytes(config.model, first.plan, length, task_mode)
        return config
    except Exception as error:  # a model may fail on the meta device in any way
        reason = f"{type(error).__name__}: {reason_of(error, 200)}"
        asked = next((method for method in growing if "batch_growth" not in method.open_keys), None)
        if asked is not None:
            raise ConfigError(
                "method.batch_growth",
                f"{getattr(asked, 'batch_growth', None)}, but the memory of this model cannot be planned ({reason})",
                "expected none",
            ) from error
    console.log(f"method.batch_growth is none: the memory of this model cannot be planned ({reason})")
    return config.model_copy(update={"method": tuple(method.without_growth() for method in config.method)})


Peak = Callable[[Phase], int]
"""Bytes that a phase with its batch sizes needs on each device."""


def first_batch(phase: Phase, config: RunConfig, world_size: int = 1, peak: Peak | None = None) -> Phase:
    """The first phase with the configured batch sizes; the micro-batch is smaller where ``method.budget.memory`` needs
    that.

    Args:
        peak: None: no method has such a budget, or nothing can be planned yet.

    Raises:
        ConfigError: as `fitted_batch`.
    """
    phase = phase.with_batch(config.training.fixed_micro_batch_size, config.training.global_batch_size)
    return phase if peak is None else fitted_batch(phase, config, world_size, phase.micro_batch_size, peak)


def fitted_batch(phase: Phase, config: RunConfig, world_size: int, most: int, peak: Peak) -> Phase:
    """The phase with the largest micro-batch, at most `most`, that fits into ``method.budget.memory``.

    Raises:
        ConfigError: not even 1 fits.
    """
    limit, total = config.memory_budget, phase.global_batch_size
    assert limit is not None, "a peak is given where there is a budget"

    def sized(micro: int) -> Phase:
        return phase.with_batch(micro, total, phase.lr_factor)

    def fits(micro: int) -> bool:
        return peak(sized(micro)) <= limit

    sizes = [size for size in range(1, most + 1) if total % (size * world_size) == 0]
    if not sizes or not fits(sizes[0]):
        raise ConfigError(
            "method.budget",
            f"memory is {limit / 2**30:.3g}GiB, and phase {phase.name} ({phase.plan.describe()}) needs "
            f"{peak(sized(1)) / 2**30:.3g}GiB at micro-batch 1, as planned",
            "expected more, a smaller task.max_length, model.gradient_checkpointing: true or a higher "
            "deepspeed.zero_stage",
        )
    low, high = 0, len(sizes)
    while high - low > 1:  # the one at `low` fits
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return sized(sizes[low])


def resumed_batch(phase: Phase, world_size: int, limit: int | None = None) -> Phase:
    """A phase from a checkpoint, with its global batch, for the present number of ranks.

    Args:
        limit: a micro-batch that the user has set since the checkpoint; None: the phase's own.
    """
    micro = largest_micro_batch(phase.global_batch_size, world_size, limit or phase.micro_batch_size)
    return phase.with_batch(micro, phase.global_batch_size, phase.lr_factor)


def shrunk_batch(phase: Phase, world_size: int, step: int) -> Phase:
    """A phase whose micro-batch did not fit: half of it, or less where half does not divide the global batch, which
    stays.

    Args:
        step: the step that ran out of memory, for the error.

    Raises:
        OutOfMemoryConfigError: the micro-batch is 1.
    """
    if phase.micro_batch_size == 1:
        raise OutOfMemoryConfigError(
            "training.on_oom",
            f"shrink, and step {step} ran out of memory at micro-batch 1; the steps before it are saved",
            "resume with model.gradient_checkpointing: true or a higher deepspeed.zero_stage, or start over with a "
            "smaller task.max_length or model.quantization: nf4",
        )
    micro = largest_micro_batch(phase.global_batch_size, world_size, phase.micro_batch_size // 2)
    return phase.with_batch(micro, phase.global_batch_size, phase.lr_factor)


def grown_batch(
    phase: Phase,
    before: Phase,
    config: RunConfig,
    targets: dict[str, Shape],
    length: int,
    world_size: int,
    task_mode: TaskMode,
    parameters: Mapping[str, TensorShape],
    within: Peak | None = None,
) -> tuple[Phase, str | None]:
    """The next phase, with a micro-batch that grows into the freed memory as its `batch_growth` says: the peak of a
    step's tensors, with adapters and their optimizer state, stays at or below that of the phase before.

    Args:
        before: the phase that has just ended.
        length: tokens of the longest training sample, for which memory is computed.
        parameters: of the base, name -> shape.
        within: given where ``method.budget.memory`` is the limit, not the phase before: the micro-batch is then the
            largest that fits up to the configured one, or with growth up to a process's whole share.

    Returns:
        The phase, and a remark on the planned memory for the log; None where nothing may grow.
    """
    micro, total = before.micro_batch_size, before.global_batch_size
    if within is not None:
        most = config.training.fixed_micro_batch_size if phase.batch_growth == "none" else total // world_size
        fitted = fitted_batch(phase.with_batch(micro, total, before.lr_factor), config, world_size, most, within)
        return fitted, "method.budget.memory" if fitted.micro_batch_size != micro else None
    if phase.batch_growth == "none":
        return phase.with_batch(micro, total, before.lr_factor), None

    def peak(samples: int) -> int:
        return cached_step_bytes(config.model, phase.plan, length, task_mode, samples).peak

    # How many samples fit into the memory that the old plan needed?
    fixed = targets, config.deepspeed.zero_stage, world_size, parameters
    old = cached_step_bytes(config.model, before.plan, length, task_mode, micro).peak + state_bytes(before.plan, *fixed)
    state, keeps = state_bytes(phase.plan, *fixed), phase.batch_growth == "keep_global"
    limit = grown_micro_batch(micro, total // world_size if keeps else MAX_BATCH // total * micro, old - state, peak)
    if keeps:
        larger = largest_micro_batch(total, world_size, limit)
        grown = phase.with_batch(larger, total, before.lr_factor)
    else:
        larger, size = limit, total // micro * limit
        exponent = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[phase.lr_scaling]
        grown = phase.with_batch(larger, size, before.lr_factor * (size / total) ** exponent)
    if larger > micro:
        sizes = " -> ".join(f"{size / 2**20:,.1f}" for size in (old, peak(larger) + state))
        return grown, f"planned peak of a step with adapters and optimizer state: {sizes} MiB"
    nearest = nearest_global_batch(total, world_size, micro, limit)
    if nearest is None:
        return grown, "no larger micro-batch fits"
    return grown, (
        f"micro-batches up to {limit} fit, and none of them divides the global batch; with training.global_batch_size "
        f"{nearest[0]} it would grow to {nearest[1]}"
    )
