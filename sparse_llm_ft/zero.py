"""Where DeepSpeed keeps the float32 masters and the moments of the trained parameters, stage by stage.

Together with engine.py the only place that knows DeepSpeed's private parts:

    stage 0, float32   no wrapper: the model's own parameters are what the optimizer updates
    stage 0, bfloat16  FP16_UnfusedOptimizer: one float32 copy per parameter
    stages 1, 2        one flat float32 partition per parameter group and rank; a parameter's `_hp_mapping` says
                       which part of it lies here (None: none)
    stage 3            one flat float32 partition per sub-group and rank, every parameter cut into equal shards

Written against deepspeed 0.19; tests/distributed/cases.py reads and writes through it at each stage.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from sparse_llm_ft.optim import AdapterOptimizer

Group = dict[str, Any]
_LEFT_ON_MODULES = ("pre_bwd_fn", "post_bwd_fn")
_HOOK_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's shape, also where stage 3 has left an empty tensor in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def masters(wrapped: Any, optimizer: AdapterOptimizer) -> list[tuple[Group, torch.Tensor]]:
    """The tensors on this rank that the optimizer updates, each with its parameter group.

    Args:
        wrapped: what `deepspeed.initialize` returned as optimizer.
        optimizer: the one it was given.
    """
    groups = optimizer.param_groups
    if hasattr(wrapped, "fp32_partitioned_groups_flat"):  # stage 3
        flats = enumerate(wrapped.fp32_partitioned_groups_flat)
        return [(groups[wrapped.sub_group_to_group_id[i]], flat) for i, flat in flats]
    for attribute in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):  # stages 1 and 2
        if hasattr(wrapped, attribute):
            return list(zip(groups, getattr(wrapped, attribute), strict=True))
    return [(group, parameter) for group in groups for parameter in group["params"]]  # stage 0


def link_states(wrapped: Any) -> None:
    """Let stages 1 and 2 find the optimizer state by parameter; they would do so only after the first step."""
    if hasattr(wrapped, "_lazy_init_hp_params_optimizer_state"):
        wrapped._lazy_init_hp_params_optimizer_state()


def read(wrapped: Any, optimizer: AdapterOptimizer, parameter: nn.Parameter, key: str | None) -> torch.Tensor:
    """float32 value (key None) or moment `key` of one parameter, unsharded. Collective."""
    if _is_sharded(parameter):
        full = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
        return full.detach().view(full_shape(parameter))
    master = _whole_master(wrapped, parameter)
    return (master if key is None else optimizer.state[master][key]).detach()


def read_gradient(parameter: nn.Parameter) -> torch.Tensor:
    """The gradient of the next step, averaged over ranks, unsharded. Collective."""
    gradient = safe_get_full_grad(parameter) if _is_sharded(parameter) else parameter.grad
    if gradient is None:
        return torch.zeros(full_shape(parameter), device=parameter.device)
    return gradient.detach().view(full_shape(parameter))


def gathered(module: nn.Module) -> AbstractContextManager[Any]:
    """A context in which the module's own parameters are whole; nothing to do but at stage 3. Collective there."""
    sharded = [p for p in module.parameters(recurse=False) if hasattr(p, "ds_id")]
    return GatheredParameters(sharded) if sharded else nullcontext()


def write(wrapped: Any, optimizer: AdapterOptimizer, parameter: Any, value: torch.Tensor, key: str | None) -> None:
    """Overwrite what `read` reads; each rank stores its shard of `value` (float32, full shape)."""
    if hasattr(parameter, "ds_id"):
        shard = _shard(parameter, value)
        if key is None:
            safe_set_local_fp32_param(parameter, shard)
        else:
            safe_set_local_optimizer_state(parameter, shard, key)
    elif hasattr(parameter, "_hp_mapping"):
        parameter.set_full_hp_param(value, key)
    else:
        master = _whole_master(wrapped, parameter)
        (master if key is None else optimizer.state[master][key]).data.copy_(value)


@torch.no_grad()
def copy_masters_to_model(wrapped: Any) -> None:
    """After masters were overwritten: bring the model's own copies in line, as the end of a step does. Collective."""
    if hasattr(wrapped, "fp32_partitioned_groups_flat"):
        wrapped._partition_all_parameters()
        for i in range(len(wrapped.fp32_partitioned_groups_flat)):
            wrapped._reassign_or_swap_out_partitioned_parameters(i)
        if wrapped.persistent_parameters:
            wrapped.persistent_parameters[0].all_gather(wrapped.persistent_parameters)
    elif hasattr(wrapped, "update_lp_params"):
        wrapped.update_lp_params()
    elif hasattr(wrapped, "fp16_groups"):
        for copies, own in zip(wrapped.fp32_groups, wrapped.fp16_groups, strict=True):
            for copy, parameter in zip(copies, own, strict=True):
                parameter.data.copy_(copy.data)


def forget(parameters: Iterable[nn.Parameter]) -> None:
    """Cut a destroyed engine's ties to parameters that live on.

    At stages 1 and 2 a parameter is a view of its group's flat buffer and would keep the whole of it alive; at stage 3
    every parameter, frozen ones included, refers to the optimizer.
    """
    # A cache on a method, keyed by its object: it would keep stage 3's coordinator, and every parameter it traced.
    decorated: Any = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(decorated).nonlocals["func"].cache_clear()
    parameter: Any
    for parameter in parameters:
        for attribute in ("_z3_optimizer", "_zero_optimizer"):
            if hasattr(parameter, attribute):
                delattr(parameter, attribute)
        if hasattr(parameter, "_hp_mapping"):
            del parameter._hp_mapping
            parameter.data = parameter.data.clone()
        parameter.grad = None


def cast_whole(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is not cut yet, fresh adapters; DeepSpeed does so only in a model of which nothing is cut."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)


def hooks(model: nn.Module) -> set[tuple[int, str, int]]:
    """The hooks registered on the model's modules, to tell later which ones an engine added."""
    return {(id(m), kind, key) for m in model.modules() for kind in _HOOK_KINDS for key in getattr(m, kind)}


def remove_hooks(model: nn.Module, keep: set[tuple[int, str, int]]) -> None:
    """Remove all hooks but those in `keep`.

    `DeepSpeedEngine.destroy` leaves its hooks on the module it wrapped (deepspeed 0.19.8; cf. DeepSpeed issues 4856 and
    7204): they would hold the old engine and its optimizer state in memory, and run in the next engine's forward. At
    stage 3 it also leaves functions on every module that call back into the old engine during backward, and that the
    next engine would take for its own.
    """
    for module in model.modules():
        for left_over in _LEFT_ON_MODULES:
            module.__dict__.pop(left_over, None)
        for kind in _HOOK_KINDS:
            registered = getattr(module, kind)
            for key in [key for key in registered if (id(module), kind, key) not in keep]:
                del registered[key]


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _whole_master(wrapped: Any, parameter: nn.Parameter) -> torch.Tensor:
    """Stage 0: the float32 copy of a bfloat16 parameter, or the parameter itself."""
    if hasattr(wrapped, "fp16_groups"):
        for copies, own in zip(wrapped.fp32_groups, wrapped.fp16_groups, strict=True):
            for copy, candidate in zip(copies, own, strict=True):
                if candidate is parameter:
                    return copy
    return parameter


def _shard(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """This rank's part of `value` as stage 3 cuts it: equal parts, the last one padded."""
    size = parameter.ds_tensor.numel()
    group = parameter.ds_process_group
    padded = value.new_zeros(size * dist.get_world_size(group))
    padded[: value.numel()] = value.flatten()
    return padded.narrow(0, size * dist.get_rank(group), size)
