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
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from sparse_llm_ft.model.fused import Fused

Pair = tuple[torch.Tensor, torch.Tensor]

_NAME = "apply_rotary_pos_emb"


def rotary_form(module: nn.Module) -> Callable[..., Any] | None:
    """The forward function of an attention module's class with `rotate` in place of transformers' function; None for
    any other module.
    """
    forward = type(module).forward
    innermost = inspect.unwrap(forward)
    if not isinstance(innermost, FunctionType) or _NAME not in innermost.__code__.co_names:
        return None
    original = innermost.__globals__.get(_NAME)
    return None if original is None or not _computes(original) else _form(forward, original)


@functools.cache
def _form(forward: Any, original: Callable[..., Any]) -> Callable[..., Any] | None:
    """A copy of `forward`, and of the decorators around it, in which the name stands for `rotate`; None: a decorator
    holds the function in an unknown way. All layers share it, so that torch.compile compiles them once.
    """
    if not isinstance(forward, FunctionType):
        return None
    names, cells = forward.__globals__, forward.__closure__
    wrapped = getattr(forward, "__wrapped__", None)
    if wrapped is not None:
        inner, held = _form(wrapped, original), [cell.cell_contents is wrapped for cell in cells or ()]
        if inner is None or held.count(True) != 1:
            return None
        cells = tuple(CellType(inner) if own else cell for own, cell in zip(held, cells or (), strict=True))
    else:
        names = {**names, _NAME: functools.partial(rotate, original)}
        del names["__name__"]  # by which torch.compile would look names up in transformers' module
    form = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, cells)
    form.__kwdefaults__ = forward.__kwdefaults__
    functools.update_wrapper(form, forward)
    if wrapped is None:
        del form.__wrapped__  # type: ignore[attr-defined]
    return form


def rotate(original: Callable[..., Pair], *args: Any, **named: Any) -> Pair:
    """q and k, rotated, of the call ``original(q, k, cos, sin)``. `original` itself answers every other call, and one
    whose tensors are not those of the equation above, such as heads that turn in part.
    """
    if named or len(args) != 4 or not _is_known(*args):
        return original(*args, **named)
    q, k, cos, sin = args
    batch, _, length, width = q.shape
    # By token, as projections lay their output out. The function returns no views: those could not be changed in place.
    tokens = [x.transpose(1, 2).reshape(batch * length, x.shape[1], width) for x in (q, k)]
    rotated: Pair = _Rotary.apply(*tokens, cos, sin)  # type: ignore[no-untyped-call]
    q, k = (x.view(batch, length, x.shape[1], width).transpose(1, 2) for x in rotated)
    return q, k


def _is_known(q: Any, k: Any, cos: Any, sin: Any) -> bool:
    if not all(isinstance(x, torch.Tensor) for x in (q, k, cos, sin)):
        return False
    if not (q.ndim == k.ndim == 4 and cos.ndim == 3 and cos.shape == sin.shape and q.shape[3] % 2 == 0):
        return False
    (batch, _, *size), (_, *angles) = q.shape, cos.shape
    same = size == [*k.shape[2:]] == angles and batch == k.shape[0] and cos.shape[0] in (1, batch)
    return same and q.dtype == k.dtype == cos.dtype == sin.dtype and not (cos.requires_grad or sin.requires_grad)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        ctx.save_for_backward(cos, sin)
        rotated = _rotated(q, k, *_by_token(q, cos, sin))
        needed = ctx.needs_input_grad
        ctx.mark_non_differentiable(*(x for x, differs in zip(rotated, needed, strict=False) if not differs))
        return rotated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grads = grad_q.contiguous(), grad_k.contiguous()
        return *_rotated_back(*grads, *_by_token(grad_q, cos, sin)), None, None


def _by_token(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    """cos and sin (B or 1, T, D) as (B T, D), for x (B T, heads, D)."""
    batch = x.shape[0] // cos.shape[1] if cos.shape[1] else 1
    cos, sin = (table.expand(batch, -1, -1).reshape(x.shape[0], table.shape[2]) for table in (cos, sin))
    return cos, sin


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


def _computes(original: Callable[..., Any]) -> bool:
    """Whether it computes what `rotate` does: the same bits, in float32 and bfloat16."""
    try:
        return _same_bits(original)
    except Exception:  # of any type: it may be any function of this name
        return False


@functools.cache
def _same_bits(original: Callable[..., Any]) -> bool:
    draw = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        shapes = (2, 4, 3, 8), (2, 2, 3, 8), (2, 3, 8), (2, 3, 8)
        values = [torch.randn(shape, generator=draw, device="cpu").to(dtype) for shape in shapes]
        expected, own = original(*values), rotate(original, *values)
        if not (isinstance(expected, tuple) and len(expected) == 2 and all(map(torch.equal, expected, own))):
            return False
    return True
