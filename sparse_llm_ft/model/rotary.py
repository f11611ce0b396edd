"""Rotary position embeddings as one function: two kernels in each pass on a GPU, where transformers launches a dozen.

    q' = q cos + R q sin,   R [a, b] = [-b, a]           q (B, heads, T, D), cos and sin (B or 1, T, D)
    dq = dq' cos + R^T (dq' sin),   R^T [a, b] = [b, -a]

and k alike. Backward needs cos and sin alone, which all layers share.

An attention module calls transformers' function by a name in its source file. Its copy for one model looks that name up
elsewhere; no other model of the process changes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from sparse_llm_ft.model.fused import Fused

Pair = tuple[torch.Tensor, torch.Tensor]

_NAME = "apply_rotary_pos_emb"
_WRAPPERS = "transformers.utils.deprecation"
"""What may lie around a forward function: it renames arguments of callers that are older than transformers."""


def rotary_form(module: nn.Module) -> Callable[..., Any] | None:
    """The forward function of an attention module's class with `rotate` in place of transformers' function; None for
    any other module.
    """
    forward = type(module).forward
    wrapped = getattr(forward, "__wrapped__", None)
    if wrapped is not None and getattr(forward, "__globals__", {}).get("__name__") == _WRAPPERS:
        forward = wrapped
    code = getattr(forward, "__code__", None)
    if not isinstance(code, CodeType) or _NAME not in code.co_names or hasattr(forward, "__wrapped__"):
        return None
    original = forward.__globals__.get(_NAME)
    return None if original is None or not _computes(original) else _form(forward, original)


@functools.cache
def _form(forward: FunctionType, original: Callable[..., Pair]) -> Callable[..., Any]:
    """A copy of `forward` that finds `rotate` under the name."""
    names = {**forward.__globals__, _NAME: functools.partial(rotate, original)}
    del names["__name__"]  # by which torch.compile would look names up in transformers' module
    form = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    form.__kwdefaults__ = forward.__kwdefaults__
    return functools.update_wrapper(form, forward)


def rotate(
    original: Callable[..., Pair],
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *rest: Any,
    **named: Any,
) -> Pair:
    """q and k, rotated. `original` rotates what this function does not know, such as heads that turn in part."""
    shapes = q.ndim == k.ndim == 4 and cos.ndim == 3 and cos.shape == sin.shape
    if rest or named or not shapes or not cos.shape[-1] == q.shape[-1] == k.shape[-1]:
        return original(q, k, cos, sin, *rest, **named)
    if not q.dtype == k.dtype == cos.dtype == sin.dtype or cos.requires_grad or sin.requires_grad:
        return original(q, k, cos, sin)
    rotated: Pair = _Rotary.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        ctx.save_for_backward(cos, sin)
        return _by_token(_rotated, q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_by_token(_rotated_back, grad_q, grad_k, *ctx.saved_tensors), None, None


def _by_token(
    function: Callable[..., Pair], q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> Pair:
    """Apply a function of (B T, heads, D) and (B T, D), as projections lay out their tokens."""
    batch, length = q.shape[0], q.shape[2]
    tokens = [x.transpose(1, 2).reshape(batch * length, x.shape[1], x.shape[3]) for x in (q, k)]
    angles = [x.expand(batch, -1, -1).reshape(batch * length, x.shape[2]) for x in (cos, sin)]
    q, k = function(*tokens, *angles)
    return q.view(batch, length, *q.shape[1:]).transpose(1, 2), k.view(batch, length, *k.shape[1:]).transpose(1, 2)


@Fused
def _rotated(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _half_turn(q) * sin, k * cos + _half_turn(k) * sin


@Fused
def _rotated_back(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos - _half_turn(q * sin), k * cos - _half_turn(k * sin)


def _half_turn(x: torch.Tensor) -> torch.Tensor:
    """R x."""
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


@functools.cache
def _computes(original: Callable[..., Pair]) -> bool:
    """Whether it computes what `_Rotary` does: the same bits, in float32 and bfloat16."""
    if len(inspect.signature(original).parameters) < 4:
        return False
    draw = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        shapes = (2, 4, 3, 8), (2, 2, 3, 8), (2, 3, 8), (2, 3, 8)
        values = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
        try:
            expected = original(*values)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        if not (isinstance(expected, tuple) and len(expected) == 2):
            return False
        if not all(map(torch.equal, expected, _by_token(_rotated, *values))):
            return False
    return True
