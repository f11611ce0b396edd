"""A linear layer and its adapter as one autograd function.

    H = dropout(X[:, cols]) A^T                          (T, r)
    Y = X W^T + b,  Y[:, rows] += s H B^T                (T, d_out)      s = gate(omega) * lora_alpha / r

Of a forward pass, backward gets X alone, or what X is computed from (model/recompute.py). It computes H and draws
dropout's mask again, and makes no gradient of W:

    G_H = s G[:, rows] B                                 (T, r)          G = dL/dY
    dB  = s G[:, rows]^T H                               (kept rows, r)
    dA  = G_H^T dropout(X[:, cols])                      (r, kept cols)
    ds  = sum(G[:, rows] B * H)
    dX  = G W + scatter_cols(dropout(G_H A))             (T, d_in)

W is looked up in its layer in both passes: under ZeRO-3 it is gathered for each, and a 4-bit one is dequantised for
each (model/four_bit.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from sparse_llm_ft.adapters.dropout import Mask, SeededDropout
from sparse_llm_ft.model.four_bit import computes_as_its_class, frozen_output, through_weight
from sparse_llm_ft.model.linear import LinearLayer, autocast_dtype, in_dtype
from sparse_llm_ft.model.recompute import Recipe, recipe_of


class Adapted(NamedTuple):
    """What one call of an adapted layer does not differentiate.

    Attributes:
        base: the layer below the adapter.
        scaling: lora_alpha / r, and omega if it is not trained.
        rows, cols: indices of kept rows and columns, int64; None: all.
        dropout: None: none.
    """

    base: LinearLayer
    scaling: float
    rows: torch.Tensor | None
    cols: torch.Tensor | None
    dropout: SeededDropout | None


def adapted_linear(
    x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, omega: torch.Tensor | None, call: Adapted
) -> torch.Tensor:
    """The layer's output with its adapter.

    Args:
        x: (..., d_in).
        down: A, (r, kept columns).
        up: B, (kept rows, r).
        omega: a trained omega before its gate, (1,).

    Returns:
        (..., d_out), in the base layer's output type.
    """
    output: torch.Tensor = _AdaptedLinear.apply(  # type: ignore[no-untyped-call]
        x, down, up, omega, call, recipe_of(x)
    )
    return output


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
        omega: torch.Tensor | None,
        call: Adapted,
        recipe: Recipe | None,
    ) -> torch.Tensor:
        # Autocast, if it is on, decides what the adapter computes in; else its own weights do.
        lowered = autocast_dtype(x.device)
        dtype = down.dtype if lowered is None else lowered
        output = frozen_output(call.base, x)
        if lowered is None:
            factor = _add_adapter(output, x, down, up, omega, call, dtype)
        else:
            with torch.autocast(x.device.type, enabled=False):
                factor = _add_adapter(output, x, down, up, omega, call, dtype)
        weight = call.base._parameters["weight"]
        value_of_input = None
        if recipe is None:
            ctx.save_for_backward(down, up, omega, weight, x)
        else:
            value_of_input = recipe.value
            ctx.save_for_backward(down, up, omega, weight, *recipe.inputs)
            if any(ctx.needs_input_grad[1:4]):
                value_of_input.add_user()
        ctx.known = call, dtype, x.dtype, factor, value_of_input
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call, dtype, input_dtype, factor, value_of_input = ctx.known
        own_down, own_up, omega, weight, *inputs = ctx.saved_tensors
        needs_x, needs_down, needs_up, needs_omega = ctx.needs_input_grad[:4]
        flat = grad.reshape(-1, grad.shape[-1])  # (T, d_out)
        dx = grad_down = grad_up = grad_omega = None

        # The way through the adapter, r wide.
        down, up, outer = in_dtype(dtype, own_down), in_dtype(dtype, own_up), in_dtype(dtype, flat)
        trained = isinstance(factor, torch.Tensor)
        scale = 1.0 if trained else factor  # a number goes along with a product
        wide = _full_rows(up, flat.shape[-1], call.rows)
        mask = _mask(flat.shape[0], down, call)
        narrow = times_up(outer, wide, scale, outer.is_cuda)
        if needs_down or needs_up or needs_omega:
            x = inputs[0] if value_of_input is None else value_of_input(*inputs)
            seen = _seen(in_dtype(dtype, x.reshape(-1, x.shape[-1])), call, mask)  # (T, kept cols)
            hidden = F.linear(seen, down)  # (T, r)
            if needs_omega:
                wide_type = torch.promote_types(dtype, torch.float32)
                change = (narrow * hidden).sum(dtype=wide_type) * _constant(call)
                grad_omega = change.reshape(1).to(omega.dtype)
            if needs_up:
                grad_up = gradient_of_up(outer, hidden * factor if trained else hidden, scale, outer.is_cuda)
                grad_up = in_dtype(own_up.dtype, grad_up if call.rows is None else grad_up[call.rows])
        narrow = narrow * factor if trained else narrow
        if needs_down:
            grad_down = in_dtype(own_down.dtype, torch.mm(narrow.t(), seen))

        # The way through the base's weight, to which the adapter's is added.
        if needs_x:
            dx = through_weight(flat, call.base, weight)
            _add_through_adapter(dx, narrow, down, call, mask)
            dx = in_dtype(input_dtype, dx.view(*grad.shape[:-1], dx.shape[-1]))
        return dx, grad_down, grad_up, grad_omega, None, None


def _add_adapter(
    output: torch.Tensor,
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    omega: torch.Tensor | None,
    call: Adapted,
    dtype: torch.dtype,
) -> torch.Tensor | float:
    """Add s H B^T to the base's output, in place. Returns s without rounding (`_factor`)."""
    width = output.shape[-1]
    hidden = _project(x.reshape(-1, x.shape[-1]), in_dtype(dtype, down), call)  # (T, r)
    factor = _factor(call, omega, dtype)
    wide = _full_rows(in_dtype(dtype, up), width, call.rows)  # (d_out, r)
    flat = output.view(-1, width)
    if output.dtype is not dtype:
        flat += (hidden * factor) @ wide.t()
    elif isinstance(factor, float):
        flat.addmm_(hidden, wide.t(), alpha=factor)
    else:
        flat.addmm_(hidden * factor, wide.t())
    return factor


def times_up(outer: torch.Tensor, wide: torch.Tensor, scale: float, on_gpu: bool) -> torch.Tensor:
    """scale G B, (T, r), from outer G (T, d_out) and wide B (d_out, r). With beta 0, addmm reads no tensor to add.

    Args:
        on_gpu: which of two orders is the fast one: a CPU computes the transpose four times as fast.
    """
    unread = outer.new_empty(())
    if on_gpu:
        return torch.addmm(unread, outer, wide, beta=0, alpha=scale)
    return torch.addmm(unread, wide.t(), outer.t(), beta=0, alpha=scale).t()


def gradient_of_up(outer: torch.Tensor, hidden: torch.Tensor, scale: float, on_gpu: bool) -> torch.Tensor:
    """scale G^T H, (d_out, r), from outer G (T, d_out) and hidden H (T, r).

    Args:
        on_gpu: a CPU computes the transpose up to seven times as fast. Where B has no gradient yet, autograd copies
            that into B's own layout, which on a GPU is one kernel more for each adapter.
    """
    unread = outer.new_empty(())
    if on_gpu:
        return torch.addmm(unread, outer.t(), hidden, beta=0, alpha=scale)
    return torch.addmm(unread, hidden.t(), outer, beta=0, alpha=scale).t()


def _constant(call: Adapted) -> float:
    """The factor on H B^T without a trained omega. Entries that dropout keeps grow by 1 / (1 - p)."""
    return call.scaling if call.dropout is None else call.scaling / (1.0 - call.dropout.p)


def _factor(call: Adapted, omega: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | float:
    """The factor on H B^T: a number, or (1,) with a trained omega, whose value stays on its device."""
    return _constant(call) if omega is None else omega.detach().clamp(min=0).to(dtype) * _constant(call)


def _mask(tokens: int, down: torch.Tensor, call: Adapted) -> Mask | None:
    """What dropout drops of A's input, (tokens, kept columns)."""
    return None if call.dropout is None else call.dropout.mask((tokens, down.shape[1]), down.device, down.dtype)


def _seen(x: torch.Tensor, call: Adapted, mask: Mask | None) -> torch.Tensor:
    """What A is applied to, (T, kept columns), from x (T, d_in)."""
    seen = x if call.cols is None else x.index_select(1, call.cols)
    if mask is None:
        return seen
    return mask.apply(seen) if seen is x else mask.apply_(seen)


def _project(x: torch.Tensor, down: torch.Tensor, call: Adapted) -> torch.Tensor:
    """H: (T, r)."""
    return F.linear(_seen(in_dtype(down.dtype, x), call, _mask(x.shape[0], down, call)), down)


def _full_rows(up: torch.Tensor, d_out: int, rows: torch.Tensor | None) -> torch.Tensor:
    """B with a row of zeros for every masked one: (d_out, r). Adding a product to all outputs is faster than adding a
    smaller one to some.
    """
    return up if rows is None else up.new_zeros(d_out, up.shape[1]).index_copy_(0, rows, up)


def _add_through_adapter(
    dx: torch.Tensor, narrow: torch.Tensor, down: torch.Tensor, call: Adapted, mask: Mask | None
) -> None:
    """Add G_H A, dropped as x was, to dx (T, d_in)."""
    if mask is None and call.cols is None and dx.dtype == narrow.dtype:
        dx.addmm_(narrow, down)
        return
    change = narrow @ down  # (T, kept cols)
    if mask is not None and call.cols is None and dx.dtype == change.dtype:
        mask.add_kept(dx, change)
        return
    if mask is not None:
        change = mask.apply_(change)
    if call.cols is None:
        dx += change
    else:
        dx.index_add_(1, call.cols, change.to(dx.dtype))


_READABLE = (nn.Linear, Linear4bit, Conv1D)


def is_readable(base: nn.Module) -> bool:
    """Whether `adapted_linear` knows this kind of layer, which must be frozen and compute what its class does."""
    if type(base) not in _READABLE or not computes_as_its_class(base):
        return False
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if weight is None or (bias is not None and bias.requires_grad):  # hooks of torch's pruning compute the weight
        return False
    return type(base) is Linear4bit or not weight.requires_grad  # no one trains 4-bit codes


def count_hooks(*modules: nn.Module) -> int:
    """How many hooks and replaced forward functions act on calls of these modules: to see or change values, or to move
    weights. It is asked at every call of a layer, and so looks into the modules' dicts.
    """
    count = 0
    for module in modules:
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            count += len(own["_forward_hooks"]) + len(own["_forward_pre_hooks"])
            count += len(own["_backward_hooks"]) + len(own["_backward_pre_hooks"])
        if "forward" in own and not computes_as_its_class(module):
            count += 1
    return count
