"""A plan's memory, before anything is loaded: the tensors of a training step, traced on the meta device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sparse_llm_ft.adapters import count_parameters, count_stored_parameters
from sparse_llm_ft.adapters.masking import row_masks
from sparse_llm_ft.adapters.tuners import TensorShape
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.data.tasks.mode import CAUSAL_LM, TaskMode
from sparse_llm_ft.engine.step_trace import Batch, trace_step
from sparse_llm_ft.plan import AdapterPlan, Shape

# Bytes per value under bfloat16. Every value of an adapter, masked by the optimizer or not, has a float32 master (4),
# sharded from stage 1 on, and on every rank a bfloat16 value and gradient (2 + 2). A trained value also has two moments
# (8), and under a mask its index (4).
MASTER_BYTES, MOMENT_BYTES, INDEX_BYTES, REPLICATED_BYTES = 4, 8, 4, 4


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a step's tensors beside weights, gradients and optimizer state.

    Attributes:
        kept: alive between the forward and the backward pass.
        peak: the most alive at any time of both.
    """

    kept: int
    peak: int


def step_bytes(
    config: ModelConfig, plan: AdapterPlan, length: int, task_mode: TaskMode = CAUSAL_LM, samples: int = 1
) -> StepBytes:
    """Bytes of a micro-batch's forward and backward pass under `plan`, see `trace_step`: with every position
    supervised and a complete mask.

    Args:
        length: tokens of each sample.
        samples: in the micro-batch.

    Raises:
        Exception: the model cannot be traced on the meta device, for any reason.
    """
    trace = trace_step(config, plan, Batch(samples, length), task_mode)
    return StepBytes(trace.kept, trace.peak)


def state_bytes(
    plan: AdapterPlan,
    shapes: dict[str, Shape],
    zero_stage: int,
    world_size: int,
    parameters: Mapping[str, TensorShape] | None = None,
) -> int:
    """Bytes per rank of trained values, gradients and optimizer state under bfloat16 (see the constants above).

    Args:
        parameters: of the base, name -> shape: those of modules that the plan trains beside its adapters (heads,
            embeddings) count too. Of an embedding whose rows are trained, only these have moments.
    """
    trained, stored = count_parameters(plan, shapes), count_stored_parameters(plan, shapes)
    indexed, rows = trained if stored > trained else 0, row_masks(plan)
    for name, shape in (parameters or {}).items():
        if any(not module or name.startswith(f"{module}.") for module in plan.trained):
            count = len(rows[name].indices) * shape[1] if name in rows else math.prod(shape)
            stored, trained = stored + math.prod(shape), trained + count
            indexed += count if name in rows else 0
    sharded = stored * MASTER_BYTES + trained * MOMENT_BYTES + indexed * INDEX_BYTES
    return sharded // (world_size if zero_stage else 1) + stored * REPLICATED_BYTES


def grown_micro_batch(micro_batch_size: int, most: int, room: int, peak: Callable[[int], int]) -> int:
    """The largest micro-batch that fits, at least `micro_batch_size` and else at most `most`.

    Args:
        room: bytes that a step's tensors may have.
        peak: micro-batch -> `StepBytes.peak`, which grows with it.
    """
    fits, beyond = micro_batch_size, most + 1
    while beyond - fits > 1:  # double until one does not fit, then halve the distance
        size = min(2 * fits, most) if beyond > most else (fits + beyond) // 2
        if peak(size) <= room:
            fits = size
        else:
            beyond = size
    return fits
