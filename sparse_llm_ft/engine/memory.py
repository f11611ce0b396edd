"""A plan's memory, before anything is loaded: the tensors of a training step, traced on the meta device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from sparse_llm_ft.adapters import add_adapters, count_parameters, count_stored_parameters
from sparse_llm_ft.adapters.masking import row_masks
from sparse_llm_ft.adapters.tuners import TensorShape
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.data.tasks.mode import CAUSAL_LM, TaskMode
from sparse_llm_ft.engine.fused_attention import FUSED
from sparse_llm_ft.engine.live_bytes import LiveBytes
from sparse_llm_ft.model.architecture import model_family
from sparse_llm_ft.model.head_loss import head_targets
from sparse_llm_ft.model.lean import make_lean
from sparse_llm_ft.model.loading import DTYPES, empty_model, enable_checkpointing
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
    """Trace a micro-batch's forward and backward pass under `plan`, with every position supervised and a complete mask.

    Attention allocates what a fused kernel does, unless `attn_implementation` is ``eager``, which makes its
    heads × length² maps. Left out are what a kernel makes and frees within one operation, a 4-bit weight while it is
    dequantised, and a weight that ZeRO-3 has gathered: these depend on neither plan nor batch.

    Args:
        length: tokens of each sample.
        samples: in the micro-batch.

    Raises:
        Exception: the model cannot be traced on the meta device, for any reason.
    """
    model = _traced_model(config, plan, task_mode)
    for parameter in model.parameters():
        if parameter.requires_grad:  # `state_bytes` counts gradients
            parameter.grad = torch.empty_like(parameter)
    # The mask is complete: transformers would read the values of any other one, and meta tensors have none.
    tokens = torch.zeros((samples, length), dtype=torch.long, device="meta")
    mask = torch.zeros((samples, 1, length, length), dtype=DTYPES[config.dtype], device="meta")
    with LiveBytes() as live:
        loss = _loss(model, tokens, mask, task_mode)
        kept = live.now
        loss.backward()  # type: ignore[no-untyped-call]
    return StepBytes(kept, live.peak)


def _traced_model(config: ModelConfig, plan: AdapterPlan, task_mode: TaskMode) -> PeftModel:
    """The model on the meta device as the run would build it."""
    plain = config.attn_implementation == "eager"
    try:
        model = empty_model(config, "eager" if plain else FUSED, task_mode)
    except KeyError as error:  # a model with a table of its own (Falcon, GPT-Neo)
        raise NotImplementedError("its attention does not use transformers' interface") from error
    nn.Module.to(model, DTYPES[config.dtype])  # transformers' own `to` has no types
    if config.lean == "auto":
        make_lean(model)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    peft_model = add_adapters(model, plan, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
    return peft_model.to(DTYPES[config.dtype]).train()


def _loss(model: PeftModel, tokens: torch.Tensor, mask: torch.Tensor, task_mode: TaskMode) -> torch.Tensor:
    family = model_family(model.config)
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if family == "encoder-decoder":
        inputs = {"input_ids": tokens, "decoder_input_ids": tokens}
    with head_targets(tokens):
        output = model(**inputs, **({} if family == "encoder" else {"use_cache": False}))
    logits: torch.Tensor = output.start_logits if task_mode.mode == "question_answering" else output.logits
    if not logits.ndim:  # the head has computed the loss
        return logits
    logits = logits.flatten(0, -2)  # Shape: (B * length, V), (B, outputs) or (B, length)
    return F.cross_entropy(logits.float(), tokens.flatten()[: len(logits)], reduction="sum")


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
