"""``training.micro_batch_size: auto``: the largest micro-batch that the planner finds to fit."""

from __future__ import annotations

from dataclasses import replace

from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.distributed.collectives import ALONE, Coordination
from sparse_llm_ft.errors import ConfigError, UserError, reason_of
from sparse_llm_ft.planning.devices import Device
from sparse_llm_ft.planning.samples import sample_sizes
from sparse_llm_ft.planning.solve import Solution, solve
from sparse_llm_ft.planning.tables import size_text


def settle_micro_batch(context: RunContext, device: Device, ranks: Coordination = ALONE) -> RunConfig:
    """Collective, as `ranks` says. The settings with a number in the place of ``auto``: rank 0 decides. A run that has
    a checkpoint keeps the number in its folder.

    Args:
        device: of each process.

    Raises:
        ConfigError: the device's memory is not known, no micro-batch fits, or the model's memory cannot be planned.
    """
    config = context.config
    if config.training.micro_batch_size != "auto":
        return config
    chosen: list[int] = []
    ranks.on_rank_zero(lambda: chosen.append(_kept(context) or _planned(context, device)))
    return with_micro_batch(context, int(ranks.broadcast(str(chosen[0]) if chosen else ""))).config


def with_micro_batch(context: RunContext, size: int) -> RunContext:
    """The context with this micro-batch."""
    training = context.config.training.model_copy(update={"micro_batch_size": size})
    return replace(context, config=context.config.model_copy(update={"training": training}))


def _kept(context: RunContext) -> int | None:
    """What the run decided when it began. Before its first checkpoint nothing depends on it, and the run may have been
    started again on other devices, or on more processes than it goes with.
    """
    if not (context.folder.has_config() and context.folder.has_checkpoints()):
        return None
    size = context.folder.config().training.micro_batch_size
    return size if isinstance(size, int) else None


def _planned(context: RunContext, device: Device) -> int:
    memory = device.memory
    if memory is None:
        raise ConfigError(
            "training.device_memory",
            "not given, and training.micro_batch_size is auto on a machine without a GPU",
            "expected the memory that each process may use, such as 24GiB",
        )
    try:
        found = solve("micro_batch_size", context, memory, sample_sizes(context), device.is_gpu)
    except UserError:
        raise
    except Exception as error:  # a model may fail on the meta device in any way
        reason = f"{type(error).__name__}: {reason_of(error, 200)}"
        raise ConfigError(
            "training.micro_batch_size",
            f"auto, but the memory of this model cannot be planned ({reason})",
            "expected a number",
        ) from error
    if found.value is None:
        raise ConfigError(
            "training.micro_batch_size",
            f"auto, but 1 needs {size_text(found.beyond_peak or 0)} of {size_text(memory)} on each device, as planned",
            "expected a smaller task.max_length, model.gradient_checkpointing: true, model.quantization: nf4, a higher "
            "deepspeed.zero_stage, or more processes",
        )
    context.console.log(describe(found, memory))
    return found.value


def describe(found: Solution, memory: int) -> str:
    """The answer in a line for people."""
    parts = []
    if found.value is not None and found.peak is not None:
        parts.append(f"{found.value} fits ({size_text(found.peak)} of {size_text(memory)})")
    if found.beyond is not None and found.beyond_peak is not None:
        parts.append(f"{found.beyond} does not ({size_text(found.beyond_peak)})")
    elif found.value is not None:
        parts.append("nothing beyond it is possible")
    return f"{found.field}: {', '.join(parts)}, as planned"
