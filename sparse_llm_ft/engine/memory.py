"""A plan's memory, before anything is loaded: activations that a forward pass saves, traced on the meta device."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx
from transformers import AttentionInterface

from sparse_llm_ft.adapters import add_adapters, count_parameters, count_stored_parameters
from sparse_llm_ft.adapters.masking import row_masks
from sparse_llm_ft.adapters.tuners import TensorShape
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.data.tasks.mode import CAUSAL_LM, TaskMode
from sparse_llm_ft.model.architecture import model_family
from sparse_llm_ft.model.head_loss import head_targets
from sparse_llm_ft.model.lean import make_lean
from sparse_llm_ft.model.loading import DTYPES, empty_model, enable_checkpointing
from sparse_llm_ft.plan import AdapterPlan, Shape

# Bytes per value under bfloat16. Every value of an adapter, masked by the optimizer or not, has a float32 master (4),
# sharded from stage 1 on, and on every rank a bfloat16 value and gradient (2 + 2). A trained value also has two moments
# (8), and under a mask its index (4).
MASTER_BYTES, MOMENT_BYTES, INDEX_BYTES, REPLICATED_BYTES = 4, 8, 4, 4


_FUSED = "sparse_llm_ft_fused"


class _FusedAttention(torch.autograd.Function):
    """Saves what flash-attention saves, and computes nothing. On the meta device torch would trace its plain kernel,
    whose length² maps no run with a fused kernel has.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        # In the kernels' layout: the caller's transpose then needs no copy.
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        log_sum_exp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        # transformers adds the mask to T5's position biases in every layer, and the kernel saves each sum.
        biases = [] if bias is None else [torch.empty_like(bias)]
        ctx.save_for_backward(query, key, value, output, log_sum_exp, *biases)
        return output

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: torch.Tensor) -> None:
        raise NotImplementedError("for tracing only")


def _fused_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: object, **kwargs: object
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (B, H, L, D) in, (B, L, H, D) out."""
    output: torch.Tensor = _FusedAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, kwargs.get("position_bias")
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(_FUSED, _fused_attention)


def activation_bytes(config: ModelConfig, plan: AdapterPlan, length: int, task_mode: TaskMode = CAUSAL_LM) -> int:
    """Bytes that one sample's forward pass saves for its backward pass under `plan`.

    Counts every tensor that autograd saves, each storage once and parameters excluded, with every position supervised
    and a complete attention mask. Attention counts as a fused kernel saves it (query, key, value, output, log-sum-exp,
    and T5's position biases), unless `attn_implementation` is ``eager``, which saves its heads × length² maps. Under
    gradient checkpointing, counts the layers' inputs and everything outside the layers.

    Args:
        length: tokens of the sample.

    Raises:
        Exception: the model cannot be traced on the meta device, for any reason.
    """
    # Build the model on the meta device as the run would.
    plain = config.attn_implementation == "eager"
    try:
        model = empty_model(config, "eager" if plain else _FUSED, task_mode)
    except KeyError as error:  # a model with a table of its own (Falcon, GPT-Neo)
        raise NotImplementedError("its attention does not use transformers' interface") from error
    nn.Module.to(model, DTYPES[config.dtype])  # transformers' own `to` has no types
    if config.lean == "auto":
        make_lean(model)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    peft_model = add_adapters(model, plan, low_cpu_mem_usage=True, autocast_adapter_dtype=False).to(
        DTYPES[config.dtype]
    )
    peft_model.train()

    # Record the storage of each saved tensor; the tensor itself is kept so that its address is not reused.
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        owner = tensor if tensor._base is None else tensor._base
        if not isinstance(owner, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    # Run one forward pass and the loss. The mask is complete: transformers would read the values of any other one, and
    # meta tensors have none.
    tokens = torch.zeros((1, length), dtype=torch.long, device="meta")
    mask = torch.zeros((1, 1, length, length), dtype=DTYPES[config.dtype], device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), head_targets(tokens):
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if model_family(model.config) == "encoder-decoder":
            inputs = {"input_ids": tokens, "decoder_input_ids": tokens}
        options = {} if model_family(model.config) == "encoder" else {"use_cache": False}
        output = peft_model(**inputs, **options)
        logits = output.start_logits if task_mode.mode == "question_answering" else output.logits
        if logits.ndim:  # else the head has computed the loss
            logits = logits.flatten(0, -2)  # Shape: (length, V), (1, outputs) or (1, length)
            F.cross_entropy(logits.float(), tokens.flatten()[: len(logits)], reduction="sum")
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


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


def grown_micro_batch(micro_batch_size: int, before: int, after: int, freed_state: int) -> int:
    """How many samples fit into the memory of `micro_batch_size` before, at least as many.

    Args:
        before, after: `activation_bytes` of one sample under the old and the new plan.
        freed_state: `state_bytes` that the new plan saves.
    """
    return max(micro_batch_size, (micro_batch_size * before + freed_state) // max(after, 1))
