"""An attention that allocates what a fused kernel allocates, and computes nothing, for tracing on the meta device.

There, torch would trace its plain kernel, whose length² maps no run with a fused kernel has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

FUSED = "sparse_llm_ft_fused"
"""Its name as ``attn_implementation``."""


class _FusedAttention(torch.autograd.Function):
    """The tensors of FlashAttention-2 (Dao, 2023): its output and log-sum-exp, and in backward, beside the gradients,
    a float32 accumulator of the query's and one number per row (Algorithm 2's D).
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, summed: bool
    ) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        # In the kernels' layout: the caller's transpose then needs no copy.
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        log_sum_exp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        biases = [] if bias is None else [torch.empty_like(bias) if summed else bias]
        ctx.save_for_backward(query, key, value, output, log_sum_exp, *biases)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, _, log_sum_exp, *biases = ctx.saved_tensors
        accumulator, rows = torch.empty_like(query, dtype=torch.float32), torch.empty_like(log_sum_exp)
        gradients = [torch.empty_like(tensor) for tensor in (query, key, value)]
        of_bias = torch.empty_like(biases[0]) if biases and ctx.needs_input_grad[3] else None
        del accumulator, rows
        return (*gradients, of_bias, None)


def _fused_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: object, **kwargs: object
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (B, H, L, D) in, (B, L, H, D) out."""
    bias: Any = kwargs.get("position_bias")
    summed = bias is not None  # transformers adds the mask to T5's biases in every layer, and the kernel saves each sum
    mask = args[0] if args else kwargs.get("attention_mask")
    if bias is None and isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
        bias = mask.new_empty(mask.shape, dtype=query.dtype)  # torch makes it in every layer; the kernel saves it
        groups = getattr(module, "num_key_value_groups", 1)
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)  # as `use_gqa_in_sdpa` says: none with a mask
    output: torch.Tensor = _FusedAttention.apply(query, key, value, bias, summed)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(FUSED, _fused_attention)
