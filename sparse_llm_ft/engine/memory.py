"""Memory of a plan before anything is loaded: what a forward pass keeps for backward, traced on the meta device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sparse_llm_ft.adapters import add_adapters, count_parameters, count_stored_parameters
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.data.tasks.mode import CAUSAL_LM, TaskMode
from sparse_llm_ft.model.architecture import model_family
from sparse_llm_ft.model.loading import DTYPES, empty_model
from sparse_llm_ft.plan import AdapterPlan, Shape

# Beside each trained value lie, under bfloat16, its float32 master (4), sharded from stage 1 on, and the bfloat16 value
# and its gradient (2 + 2) on every rank; so do they beside a value that the optimizer masks. A value that is really
# trained also has two moments (8), and under a mask its index (4).
MASTER_BYTES, MOMENT_BYTES, INDEX_BYTES, REPLICATED_BYTES = 4, 8, 4, 4


_FUSED = "sparse_llm_ft_fused"


class _FusedAttention(torch.autograd.Function):
    """What flash-attention keeps, without computing anything: for tracing on the meta device, where torch would
    take its plain kernel instead, which keeps length² maps that no real run with a fused kernel has.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        # Laid out as the kernels do it, so that the caller's transpose needs no copy.
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        log_sum_exp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        # transformers adds the mask to T5's position biases anew in every layer, and the kernel keeps the sum.
        biases = [] if bias is None else [torch.empty_like(bias)]
        ctx.save_for_backward(query, key, value, output, log_sum_exp, *biases)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError("for tracing only")


def _fused_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (B, H, L, D) in, (B, L, H, D) out."""
    apply: Any = _FusedAttention.apply
    return apply(query, key, value, kwargs.get("position_bias")).transpose(1, 2).contiguous(), None


AttentionInterface.register(_FUSED, _fused_attention)


def activation_bytes(config: ModelConfig, plan: AdapterPlan, length: int, task_mode: TaskMode = CAUSAL_LM) -> int:
    """Bytes that the forward pass of one sample keeps for its backward pass under `plan`.

    Counted are all tensors that autograd saves, each storage once, parameters left out, with every position
    supervised and a complete attention mask. Attention counts as a fused kernel does it (query, key, value, output,
    log-sum-exp, and T5's position biases), unless `attn_implementation` is ``eager``, which keeps its heads × length²
    maps. Under gradient checkpointing it is the inputs of the layers and what lies outside them.

    Args:
        length: tokens of the sample.
    """
    plain = config.attn_implementation == "eager"
    model: Any = empty_model(config, "eager" if plain else _FUSED, task_mode)
    model.to(DTYPES[config.dtype])
    layers = _checkpointed_bytes(config, model, length)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    peft_model = add_adapters(model, plan, low_cpu_mem_usage=True, autocast_adapter_dtype=False).to(
        DTYPES[config.dtype]
    )
    peft_model.train()
    kept: dict[int, torch.Tensor] = {}  # storage -> one tensor of it, which keeps its address from being used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        owner = tensor if tensor._base is None else tensor._base
        if not isinstance(owner, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    tokens = torch.zeros((1, length), dtype=torch.long, device="meta")
    # A mask that is complete: transformers would look at the values of any other, and there are none.
    mask = torch.zeros((1, 1, length, length), dtype=DTYPES[config.dtype], device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
        if model_family(model.config) == "encoder-decoder":
            inputs = {"input_ids": tokens, "decoder_input_ids": tokens}
        options = {} if model_family(model.config) == "encoder" else {"use_cache": False}
        output = peft_model(**inputs, **options)
        logits = output.start_logits if task_mode.mode == "question_answering" else output.logits
        logits = logits.flatten(0, -2)  # Shape: (length, V), (1, outputs) or (1, length)
        F.cross_entropy(logits.float(), tokens.flatten()[: len(logits)], reduction="sum")
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) + layers


def _checkpointed_bytes(config: ModelConfig, model: PreTrainedModel, length: int) -> int:
    """Gradient checkpointing holds each layer's input by itself, out of the hooks' sight."""
    if not config.gradient_checkpointing:
        return 0
    settings = model.config.get_text_config()
    # An encoder-decoder has layers in both stacks, and its settings count those of one.
    layers = sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules())
    return (layers or settings.num_hidden_layers) * length * settings.hidden_size * DTYPES[config.dtype].itemsize


def state_bytes(plan: AdapterPlan, shapes: dict[str, Shape], zero_stage: int, world_size: int) -> int:
    """Bytes per rank of trained values, gradients and optimizer state under bfloat16 (see the constants above)."""
    trained, stored = count_parameters(plan, shapes), count_stored_parameters(plan, shapes)
    per_trained = MOMENT_BYTES + (INDEX_BYTES if stored > trained else 0)
    sharded = stored * MASTER_BYTES + trained * per_trained
    return sharded // (world_size if zero_stage else 1) + stored * REPLICATED_BYTES


def grown_micro_batch(micro_batch_size: int, before: int, after: int, freed_state: int) -> int:
    """How many samples fit where `micro_batch_size` did, never fewer.

    Args:
        before, after: `activation_bytes` of one sample under the old and the new plan.
        freed_state: `state_bytes` that the new plan does without.
    """
    return max(micro_batch_size, (micro_batch_size * before + freed_state) // max(after, 1))
