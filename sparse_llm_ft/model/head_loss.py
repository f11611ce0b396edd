"""Cross-entropy inside of a language model's output head, without logits of all positions.

The head gets the targets beside the hidden states, and returns the loss in place of logits. It goes through the
positions in chunks, and makes the gradient of each chunk at once: of (positions x vocabulary) numbers, nothing outlives
its chunk. Under ZeRO-3 the head's weight is gathered in that moment; backward does not need it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from sparse_llm_ft.data.collate import IGNORE_INDEX

CHUNK_ELEMENTS = 2**24
"""Logits of a chunk: 64 MiB in float32."""
CHUNK_ELEMENTS_CUDA = 2**26
"""On a GPU, where a smaller chunk takes less time to multiply than its weight to read."""

planned_on_gpu: ContextVar[bool] = ContextVar("planned_on_gpu", default=False)
"""Whether tensors of the meta device stand for a GPU's."""

_targets: ContextVar[torch.Tensor | None] = ContextVar("targets", default=None)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        needed = ctx.needs_input_grad[0]
        total = hidden.new_zeros((), dtype=torch.float32)
        grad = torch.empty_like(hidden) if needed else None
        on_gpu = hidden.is_cuda or (hidden.is_meta and planned_on_gpu.get())
        size = max(1, (CHUNK_ELEMENTS_CUDA if on_gpu else CHUNK_ELEMENTS) // weight.shape[0])
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            loss, rows = _loss_and_gradient(hidden[chunk], weight, bias, targets[chunk], needed)
            total += loss
            if grad is not None and rows is not None:
                grad[chunk] = rows
        if grad is not None:
            ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * outer).to(grad.dtype), None, None, None


def _loss_and_gradient(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A chunk's summed loss, and its gradient by the hidden states (C, d). Every pass over (C, V) numbers costs as much
    as a layer's element-wise work, so there are few, and in place.
    """
    logits = hidden @ weight.t()  # (C, V)
    scores = torch.log_softmax(logits if bias is None else logits + bias, 1, dtype=torch.float32)
    del logits
    counted = targets != IGNORE_INDEX  # (C,)
    own = targets.clamp(min=0).unsqueeze(1)
    loss = -(scores.gather(1, own).squeeze(1) * counted).sum()
    if not needs_grad:
        return loss, None
    scores.exp_().scatter_add_(1, own, scores.new_full(own.shape, -1.0))  # softmax minus one at the target
    return loss, (scores.to(hidden.dtype) @ weight) * counted.unsqueeze(1)


def chunked_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """Scalar float32: the cross-entropy of ``hidden @ weight.T + bias``, summed over all targets but IGNORE_INDEX.

    Args:
        hidden: (N, d).
        weight: (V, d); it gets no gradient, nor does `bias` (V,).
        targets: (N,) int64.
    """
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
    return loss


@contextmanager
def head_targets(targets: torch.Tensor) -> Iterator[None]:
    """A context in which heads changed by `make_head_lean` return the loss of `targets` (B, P), a scalar."""
    token = _targets.set(targets)
    try:
        yield
    finally:
        _targets.reset(token)


def _head_forward(head: Any, hidden: torch.Tensor) -> torch.Tensor:
    targets = _targets_of(head, hidden)
    if targets is None:
        return type(head).forward(head, hidden)  # type: ignore[no-any-return]
    flat = hidden.reshape(-1, hidden.shape[-1])
    return chunked_cross_entropy(flat, head.weight, head.bias, targets.to(flat.device).reshape(-1))


def _targets_of(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor | None:
    """The targets, if a lean head computes the loss of `hidden` (B, P, d) in place of logits."""
    targets = _targets.get()
    trained = any(parameter.requires_grad for parameter in head.parameters())
    return None if targets is None or trained or targets.shape != hidden.shape[:-1] else targets


def computes_loss(forward: Any, hidden: torch.Tensor) -> bool:
    """Whether a head's `forward` makes a loss of `hidden`, so that its backward pass needs no weight."""
    lean = getattr(forward, "__func__", None) is _head_forward
    return lean and _targets_of(forward.__self__, hidden) is not None


def make_head_lean(model: PreTrainedModel) -> bool:
    """Let the output head of `model` compute the loss where `head_targets` asks for it.

    Returns:
        False, and nothing is changed, if the model does more with its logits than return them (Gemma caps them), or has
        no such head.
    """
    head: Any = model.get_output_embeddings()
    known = type(head) is nn.Linear and "forward" not in head.__dict__
    if not (known and _returns_what_its_head_does(model, head)):
        return False
    head.forward = MethodType(_head_forward, head)
    return True


def _returns_what_its_head_does(model: PreTrainedModel, head: Any) -> bool:
    """Whether the model's logits are its head's output itself, asked with everything below the head left out."""
    body: Any = model.base_model
    if body is model or "forward" in body.__dict__:
        return False
    hidden = torch.zeros(1, 2, head.in_features, dtype=head.weight.dtype, device=head.weight.device)
    given = torch.zeros(1, 2, 3, device=hidden.device)
    body.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden)
    head.forward = lambda _: given
    try:
        with torch.no_grad():
            output = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=hidden.device), use_cache=False)
        return getattr(output, "logits", None) is given
    except Exception:  # a model's own code, given a body that it does not know
        return False
    finally:
        del body.forward, head.forward
