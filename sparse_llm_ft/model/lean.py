"""Element-wise parts of a frozen base that keep less for backward, or take fewer kernels: those of the Llama family.

    RMSNorm   y = w * x / sqrt(mean(x^2) + eps)      keeps x and one number per position
    SwiGLU    y = silu(gate) * up                    keeps gate and up
    rotary position embeddings                       see rotary.py

transformers' own keep each intermediate result: RMSNorm its float32 input and its normalised output, SwiGLU also
silu(gate) and y. No matrix product is computed again. Modules are recognised by what they compute, not by their name:
a small copy with random weights must give bit by bit what the lean form gives.
"""

from __future__ import annotations

import copy
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from sparse_llm_ft.model.fused import Fused
from sparse_llm_ft.model.head_loss import make_head_lean
from sparse_llm_ft.model.linear import autocast_dtype
from sparse_llm_ft.model.recompute import mark
from sparse_llm_ft.model.rotary import rotary_form

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
        output, inverse = _norm(_rows(x), weight.detach(), epsilon)
        inverse = inverse.view(*x.shape[:-1], 1)
        ctx.save_for_backward(x, inverse, weight)
        ctx.mark_non_differentiable(inverse)
        return output.view(x.shape), inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inverse, weight = ctx.saved_tensors
        return _norm_backward(_rows(grad), _rows(x), _rows(inverse), weight.detach()).view(x.shape), None, None


@Fused
def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, d), and 1 / sqrt(mean(x^2) + eps) as (T, 1) float32."""
    inverse = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * (x.float() * inverse).to(x.dtype), inverse


@Fused
def _norm_again(x: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * (x.float() * inverse).to(x.dtype)


@Fused
def _norm_backward(grad: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    outer = (grad * weight).float()
    unit = x.float() * inverse
    outer -= unit * (outer * unit).mean(-1, keepdim=True)
    return outer.mul_(inverse).to(x.dtype)


def _normalised(x: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _norm_again(_rows(x), _rows(inverse), weight).view(x.shape)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNorm of x (..., d) as Llama computes it; `weight` (d,) gets no gradient."""
    output, inverse = _RMSNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    # Under ZeRO-3 the weight is gathered while its own module runs backward, and not yet when later ones do.
    kept = weight.detach().clone() if hasattr(weight, "ds_id") else weight.detach()
    return mark(output, _normalised, x, inverse, kept)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = _product_backward(_rows(grad), _rows(gate), _rows(up))
        return grad_gate.view(gate.shape), grad_up.view(up.shape)


@Fused
def _product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


@Fused
def _product_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _product(_rows(gate), _rows(up)).view(gate.shape)


def _rows(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, values.shape[-1])


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of two tensors of one shape."""
    return mark(_SwiGLU.apply(gate, up), _gated, gate, up)  # type: ignore[no-untyped-call]


def make_lean(model: nn.Module) -> int:
    """Give every RMSNorm, SwiGLU, attention and language model's head in `model` its lean forward function (for
    attention see rotary.py, for the head head_loss.py); other modules stay as they are.

    Returns:
        The number of modules changed.
    """
    known: dict[tuple[object, ...], bool] = {}
    count = int(isinstance(model, PreTrainedModel) and make_head_lean(model))
    for module in model.modules():
        if "forward" not in module.__dict__ and (form := rotary_form(module)) is not None:
            module.forward = MethodType(form, module)
            count += 1
            continue
        lean = _lean_form(module)
        if lean is None:
            continue
        key = (
            type(module),
            *(getattr(module, name, None) for name in _EPSILONS),
            type(getattr(module, "act_fn", None)),
        )
        if key not in known:
            known[key] = _computes(module)
        if known[key]:
            module.forward = MethodType(lean, module)
            count += 1
    return count


def is_lean(module: nn.Module) -> bool:
    """Whether `make_lean` changed this RMSNorm or SwiGLU."""
    return getattr(module.__dict__.get("forward"), "__func__", None) in (_norm_forward, _mlp_forward)


def _lean_form(module: nn.Module) -> Any:
    """The lean forward function of a module with the parts of an RMSNorm or a SwiGLU; None for any other."""
    if "forward" in module.__dict__:
        return None
    parameters, children = dict(module.named_parameters(recurse=False)), dict(module.named_children())
    if not children and list(parameters) == ["weight"] and parameters["weight"].ndim == 1 and _epsilon(module):
        return _norm_forward
    parts = {name for name, child in children.items() if next(child.parameters(), None) is not None}
    return _mlp_forward if not parameters and parts == {*_PROJECTIONS} and hasattr(module, "act_fn") else None


def _epsilon(module: nn.Module) -> float | None:
    return next((value for value in (getattr(module, name, None) for name in _EPSILONS) if value), None)


def _norm_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    if module.weight.requires_grad or autocast_dtype(x.device) is not None:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    epsilon = _epsilon(module)
    assert epsilon is not None
    return rms_norm(x, module.weight, epsilon)


def _mlp_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(swiglu(gate, up))  # type: ignore[no-any-return]


def _computes(module: nn.Module) -> bool:
    """Whether a small copy of `module` computes what its lean form does: the same bits, in float32 and bfloat16."""
    draw = torch.Generator().manual_seed(0)
    small = copy.copy(module)
    small.__dict__ = {**module.__dict__}
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        small.__dict__[hooks] = {}
    children = dict(module.named_children())
    for dtype in (torch.float32, torch.bfloat16):
        if children:
            weights = [torch.randn(shape, generator=draw).to(dtype) for shape in ((10, 6), (10, 6), (6, 10))]
            layers: Any = {name: partial(F.linear, weight=w) for name, w in zip(_PROJECTIONS, weights, strict=True)}
            small._modules = {**children, **layers}
        else:
            weight = torch.randn(6, generator=draw).to(dtype)
            small._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
        x = torch.randn(3, 6, generator=draw).to(dtype)
        lean = _mlp_forward if children else _norm_forward
        try:
            expected = type(small).forward(small, x)
        except _NOT_A_FORWARD_OF_ONE_TENSOR:
            return False
        if not (isinstance(expected, torch.Tensor) and torch.equal(expected, lean(small, x))):
            return False
    return True


_NOT_A_FORWARD_OF_ONE_TENSOR = (RuntimeError, AttributeError, TypeError, ValueError, IndexError)
