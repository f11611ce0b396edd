"""A phase's batch sizes, from the settings, the freed memory and the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping

from sparse_llm_ft.adapters.tuners import TensorShape
from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.engine.memory import activation_bytes, grown_micro_batch, state_bytes
from sparse_llm_ft.errors import ConfigError, reason_of
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import Shape


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
        activation_bytes(config.model, first.plan, length, task_mode)
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


def first_batch(phase: Phase, config: RunConfig) -> Phase:
    """The first phase with the configured batch sizes."""
    return phase.with_batch(config.training.micro_batch_size, config.training.global_batch_size)


def resumed_batch(phase: Phase, world_size: int, limit: int | None = None) -> Phase:
    """A phase from a checkpoint, with its global batch, for the present number of ranks.

    Args:
        limit: a micro-batch that the user has set since the checkpoint; None: the phase's own.
    """
    micro = largest_micro_batch(phase.global_batch_size, world_size, limit or phase.micro_batch_size)
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
) -> Phase:
    """The next phase, with a micro-batch that grows into the freed memory as its `batch_growth` says.

    Args:
        before: the phase that has just ended.
        length: tokens of the longest training sample, for which memory is computed.
        parameters: of the base, name -> shape.
    """
    micro, total = before.micro_batch_size, before.global_batch_size
    if phase.batch_growth == "none":
        return phase.with_batch(micro, total, before.lr_factor)
    # How many samples fit into the memory that the old plan needed?
    fixed = targets, config.deepspeed.zero_stage, world_size, parameters
    freed = state_bytes(before.plan, *fixed) - state_bytes(phase.plan, *fixed)
    old, new = (activation_bytes(config.model, plan, length, task_mode) for plan in (before.plan, phase.plan))
    limit = grown_micro_batch(micro, old, new, freed)
    if phase.batch_growth == "keep_global":
        return phase.with_batch(largest_micro_batch(total, world_size, limit), total, before.lr_factor)
    grown = total // micro * limit
    exponent = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[phase.lr_scaling]
    return phase.with_batch(limit, grown, before.lr_factor * (grown / total) ** exponent)
