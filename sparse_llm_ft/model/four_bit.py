"""Products with frozen weights, 4-bit ones above all, that leave the weights where they are.

bitsandbytes' own function keeps the weight that it was given until its graph is freed. Under ZeRO-3 that is the
gathered one: after a forward pass every rank would hold all of a 4-bit base, with activation checkpointing too. This
one remembers the layer, whose weight is gathered again for backward, and dequantises it there. Of other linear layers
DeepSpeed's own function keeps the input too, which a frozen weight's backward pass does not need.

bitsandbytes' operators are called here directly, and not by way of its functions: a step of an 8B model makes a
thousand calls, and these functions run Python around each.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.autograd.function import once_differentiable

from sparse_llm_ft.model.linear import LinearLayer, in_dtype, is_transposed


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        ctx.save_for_backward(layer.weight)
        ctx.layer = layer
        return frozen_output(layer, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return through_weight(grad, ctx.layer, weight), None


_STATISTICS = 256
"""Block size of quantised statistics, the only one that bitsandbytes' product takes."""
_plainly = torch._C.DisableTorchFunctionSubclass
"""A context in which `Params4bit` is a tensor like others: its class has each operation call Python first."""


def frozen_output(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What a layer's class computes, (..., d_out) from x (..., d_in), without the layer's hooks. Call it in the forward
    pass of an autograd function: bitsandbytes' operator has no backward pass.
    """
    kind, own = type(layer), layer._parameters
    if kind is nn.Linear and "weight" in own:
        return F.linear(x, own["weight"], own["bias"])
    if kind is not Linear4bit:
        return kind.forward(layer, x)  # type: ignore[no-any-return]
    with _plainly():
        weight = own["weight"]
        state: Any = getattr(weight, "quant_state", None)
        if not _is_usual(layer, state, x):
            return kind.forward(layer, x)  # type: ignore[no-any-return]
        dtype = x.dtype if layer.compute_dtype is None else layer.compute_dtype
        nested = state.state2
        output: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
            in_dtype(dtype, x),
            weight.view(-1, 1),
            state.shape,
            state.absmax if nested is None else nested.absmax,
            state.blocksize,
            state.quant_type,
            bias=None if layer.bias is None else in_dtype(dtype, layer.bias),
            absmax_8bit=None if nested is None else state.absmax,
            absmax_code=None if nested is None else nested.code,
            absmax_offset=None if nested is None else state.offset,
        )
        return in_dtype(x.dtype, output)


def _is_usual(layer: Any, state: Any, x: torch.Tensor) -> bool:
    """Whether `Linear4bit.forward` would hand the product to bitsandbytes' operator as it is. The layer's first call is
    not: it sets the type in which it computes. Releases before the operator have none. `keep_unpacked` rules out the
    repacking of weights.
    """
    if state is None or not layer.compute_type_is_set or not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        return False
    wide = x.numel() > 0 and len(state.shape) == 2 and x.shape[-1] == state.shape[1]
    known = state.state2 is None or state.state2.blocksize == _STATISTICS
    return wide and known and not getattr(state, "packing_format_for_cpu", False)


def dequantised(weight: torch.Tensor, state: Any) -> torch.Tensor:
    """The matrix (d_out, d_in) that 4-bit codes and their `QuantState` stand for, in the state's type."""
    operators = torch.ops.bitsandbytes
    with _plainly():
        scales, nested = state.absmax, state.state2
        if nested is not None:
            scales = operators.dequantize_blockwise.default(
                scales, nested.absmax, nested.code, nested.blocksize, nested.dtype
            )
            scales = in_dtype(torch.float32, scales.add_(state.offset))
        matrix: torch.Tensor = operators.dequantize_4bit.default(
            weight, scales, state.blocksize, state.quant_type, state.shape, state.dtype
        )
        return matrix


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    trained = layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)
    if trained or not (torch.is_grad_enabled() and x.requires_grad):
        return type(layer).forward(layer, x)  # type: ignore[no-any-return]
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
        weight = dequantised(weight, layer._parameters["weight"].quant_state)  # type: ignore[union-attr]
    weight = in_dtype(grad.dtype, weight)
    return grad @ (weight.t() if is_transposed(layer) else weight)
