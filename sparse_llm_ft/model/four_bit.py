"""Products with frozen weights, 4-bit ones above all, that leave the weights where they are.

bitsandbytes' own function keeps the weight that it was given until its graph is freed. Under ZeRO-3 that is the
gathered one: after a forward pass every rank would hold all of a 4-bit base, with activation checkpointing too. This
one remembers the layer, whose weight is gathered again for backward, and dequantises it there. Of other linear layers
DeepSpeed's own function keeps the input too, which a frozen weight's backward pass does not need.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.autograd.function import once_differentiable

from sparse_llm_ft.model.linear import LinearLayer, is_transposed


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        ctx.save_for_backward(layer.weight)
        ctx.layer = layer
        return _own_forward(layer, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return through_weight(grad, ctx.layer, weight), None


def _own_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return type(layer).forward(layer, x)  # type: ignore[no-any-return]


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    trained = layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)
    if trained or not (torch.is_grad_enabled() and x.requires_grad):
        return _own_forward(layer, x)
    output: torch.Tensor = _Product.apply(x, layer)  # type: ignore[no-untyped-call]
    return output


def keep_unpacked(model: nn.Module) -> None:
    """Turn off bitsandbytes' repacking of 4-bit weights in forward (on CPUs with AVX512-BF16). Under ZeRO-3 the next
    gather restores the unpacked bytes while the quantisation state says "packed", and the layer computes garbage.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def release_weights(model: nn.Module, kinds: tuple[type[nn.Linear], ...] = (Linear4bit,)) -> None:
    """Let every layer of these classes in `model` forget its weight between its forward and backward pass, as long as
    it is frozen.
    """
    for module in model.modules():
        if type(module) in kinds and "forward" not in module.__dict__:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def computes_as_its_class(layer: nn.Module) -> bool:
    """Whether a layer's forward function is its class's own, or that of `release_weights`, which computes the same."""
    own = layer.__dict__.get("forward")
    return own is None or getattr(own, "__func__", None) is _forward


def through_weight(grad: torch.Tensor, layer: LinearLayer, weight: torch.Tensor) -> torch.Tensor:
    """G W: (..., d_in), from G (..., d_out), for a layer that may be 4-bit or transposed.

    Args:
        weight: the layer's, as a backward pass has it.
    """
    if isinstance(layer, Linear4bit):
        weight = bitsandbytes.functional.dequantize_4bit(weight, layer.weight.quant_state)
    if weight.dtype is not grad.dtype:
        weight = weight.to(grad.dtype)
    return grad @ (weight.t() if is_transposed(layer) else weight)
