"""ZeRO stage 3: embeddings and output heads are gathered for one use each, without copies.

DeepSpeed treats such a table (more than a gigabyte in Llama-3-8B) like any weight. It gathers it early, together with
its neighbours, into a buffer of which it then makes copies; keeps it if it will be used again soon; and gathers the
head for the backward pass too, which needs nothing of it where the loss was computed in the head (model/head_loss.py).
Here the hooks of these two modules are removed. Their own forward functions gather the weight, compute, and let go.

Only frozen tables without adapters are handled so, and only if DeepSpeed does no more than shard them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, free_param
from torch import nn
from torch.autograd.function import once_differentiable

from sparse_llm_ft.model.architecture import base_of
from sparse_llm_ft.model.head_loss import computes_loss

PIECE_BYTES = 16 * 2**20
"""Bytes that a rank sends at a time under gloo, whose all-gather would hold everything twice."""


class Tables:
    """The frozen embeddings and output head of a model in an engine at stage 3.

    Args:
        model: with its engine's hooks.
        remove_hooks: removes an engine's hooks from one module.

    Attributes:
        modules: those that gather their own weights; `restore` makes them as they were.
    """

    def __init__(self, model: nn.Module, remove_hooks: Callable[[nn.Module], None]) -> None:
        self.modules: list[nn.Module] = []
        self._forwards: list[Callable[..., Any] | None] = []
        for module in _tables_of(base_of(model)):
            remove_hooks(module)
            self.modules.append(module)
            self._forwards.append(module.__dict__.get("forward"))
            module.forward = _gathering_forward(module)

    def restore(self) -> None:
        """Give the modules their own forward functions again."""
        for module, forward in zip(self.modules, self._forwards, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward
        self.modules, self._forwards = [], []


def _tables_of(model: Any) -> list[nn.Module]:
    """The embeddings and the head that are frozen, plain modules, each with its own shards."""
    if not hasattr(model, "get_input_embeddings"):
        return []
    found: list[nn.Module] = []
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        known = isinstance(module, nn.Embedding) or type(module) is nn.Linear
        if known and all(map(_is_plain_shard, module.parameters())):
            found.append(module)
    return found


def _is_plain_shard(parameter: Any) -> bool:
    """Whether a frozen parameter is cut into one shard for each rank, which lie where the ranks compute."""
    shard = getattr(parameter, "ds_tensor", None)
    return (
        shard is not None
        and not parameter.requires_grad
        and parameter.ds_secondary_tensor is None
        and not hasattr(shard, "ds_quant_scale")
        and shard.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        and shard.numel() == -(-parameter.ds_numel // dist.get_world_size(parameter.ds_process_group))
    )


def _gathering_forward(module: nn.Module) -> Callable[..., Any]:
    """A forward function that computes what the module's present one does, with its parameters gathered meanwhile."""
    compute, parameters = module.forward, list(module.parameters())

    def forward(*inputs: Any, **options: Any) -> Any:
        if type(module) is nn.Linear:
            (hidden,) = inputs
            if torch.is_grad_enabled() and hidden.requires_grad and not computes_loss(compute, hidden):
                return _GatheredProduct.apply(hidden, compute, parameters)  # type: ignore[no-untyped-call]
        with _gathered(parameters):
            return compute(*inputs, **options)

    return forward


class _GatheredProduct(torch.autograd.Function):
    """A frozen head's logits. Backward gathers the weight again, which autograd would keep."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, compute: Callable[..., torch.Tensor], parameters: Sequence[nn.Parameter]
    ) -> torch.Tensor:
        ctx.parameters = parameters
        with _gathered(parameters):
            return compute(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight = ctx.parameters[0]
        with _gathered([weight]):
            return grad @ weight.to(grad.dtype), None, None


@contextmanager
def _gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Collective. A context in which the parameters are whole on every rank. Those that already are stay so."""
    parameter: Any
    own = [parameter for parameter in parameters if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE]  # type: ignore[attr-defined]
    for parameter in own:
        parameter.data = _whole(parameter)
        parameter.ds_status = ZeroParamStatus.AVAILABLE
    try:
        yield
    finally:
        for parameter in own:
            free_param(parameter)


@torch.no_grad()
def _whole(parameter: Any) -> torch.Tensor:
    """Collective. The parameter's values from all ranks' shards, in its full shape."""
    group, own = parameter.ds_process_group, parameter.ds_tensor.detach()
    size = dist.get_world_size(group)
    whole = own if size == 1 else own.new_empty(size * len(own))
    if whole.is_cuda and size > 1:
        dist.all_gather_into_tensor(whole, own, group=group)
    elif size > 1:
        piece = PIECE_BYTES // own.element_size()
        for rank, shard in enumerate(whole.view(size, -1)):
            if rank == dist.get_rank(group):
                shard.copy_(own)
            for part in shard.split(piece):
                dist.broadcast(part.view(torch.uint8), dist.get_global_rank(group, rank), group=group)
    return whole[: parameter.ds_numel].view(parameter.ds_shape)
