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
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters, register_external_parameter
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import nn

from sparse_llm_ft.engine.shards import Master, ShardSlice
from sparse_llm_ft.optim import AdapterOptimizer

_STAGES_1_AND_2, _STAGE_3 = "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"
_LEFT_ON_MODULES = ("pre_bwd_fn", "post_bwd_fn", "_external_params", "ds_external_parameters", "all_parameters")
_HOOK_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's shape, also where stage 3 has left an empty tensor in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def masters(wrapped: Any, optimizer: AdapterOptimizer) -> list[Master]:
    """The tensors on this rank that the optimizer updates, each with its parameter group.

    Args:
        wrapped: what `deepspeed.initialize` returned as optimizer.
        optimizer: the one it was given.
    """
    groups = optimizer.param_groups
    if hasattr(wrapped, _STAGE_3):
        flats = enumerate(getattr(wrapped, _STAGE_3))
        return [(groups[wrapped.sub_group_to_group_id[i]], flat) for i, flat in flats]
    if hasattr(wrapped, _STAGES_1_AND_2):
        return list(zip(groups, getattr(wrapped, _STAGES_1_AND_2), strict=True))
    return [(group, parameter) for group in groups for parameter in group["params"]]  # stage 0


def shard_slices(
    wrapped: Any, parameters: Mapping[str, Any], masters: Sequence[Master]
) -> dict[str, ShardSlice | None]:
    """Where each parameter's part on this rank lies in the masters, by DeepSpeed's own record."""
    if hasattr(wrapped, _STAGE_3):
        return {name: _slice_at_stage_3(wrapped, parameter) for name, parameter in parameters.items()}
    if is_sharded(wrapped):
        return {name: _slice_at_stages_1_and_2(parameter) for name, parameter in parameters.items()}
    number = {id(parameter): i for i, parameter in enumerate(_own_of_masters(wrapped, masters))}
    return {name: ShardSlice(number[id(parameter)], 0, 0, parameter.numel()) for name, parameter in parameters.items()}


def is_sharded(wrapped: Any) -> bool:
    """Whether each rank holds a part of the masters (stages 1 to 3)."""
    return hasattr(wrapped, _STAGES_1_AND_2) or hasattr(wrapped, _STAGE_3)


def flat_gradients(wrapped: Any, masters: Sequence[Master]) -> list[torch.Tensor]:
    """Each master's gradients of the optimizer step that is about to be made: averaged over ranks, not yet clipped.

    Between the last `backward` of an accumulation and its `step`.
    """
    if not is_sharded(wrapped):
        own = _own_of_masters(wrapped, masters)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
    at_stage_3 = hasattr(wrapped, _STAGE_3)
    if wrapped.offload_optimizer if at_stage_3 else wrapped.cpu_offload:
        if not at_stage_3:
            wrapped._wait_for_offload_copies()
        return [master.grad for _, master in masters]  # type: ignore[misc]
    parts = wrapped.averaged_gradients
    return [torch.cat([part.reshape(-1) for part in parts[i]]) for i in range(len(masters))]


def _slice_at_stage_3(wrapped: Any, parameter: Any) -> ShardSlice | None:
    master, offset, size = wrapped.grad_position[wrapped.get_param_id(parameter)]
    start = size * dist.get_rank(parameter.ds_process_group)  # equal parts, the last one padded
    length = min(size, parameter.ds_numel - start)
    return ShardSlice(master, offset, start, length) if length > 0 else None


def _slice_at_stages_1_and_2(parameter: Any) -> ShardSlice | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    here, of_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
    return ShardSlice(mapping.param_group_index, here.start, of_parameter.start, of_parameter.numel)


def _own_of_masters(wrapped: Any, masters: Sequence[Master]) -> list[Any]:
    """Stage 0: the model's own parameter of each master, which under float32 is the master."""
    if not hasattr(wrapped, "fp16_groups"):
        return [master for _, master in masters]
    copies = zip(wrapped.fp32_groups, wrapped.fp16_groups, strict=True)
    own = {id(c): p for group, parameters in copies for c, p in zip(group, parameters, strict=True)}
    return [own[id(master)] for _, master in masters]


def gathered(module: nn.Module) -> AbstractContextManager[Any]:
    """A context in which the module's own parameters are whole; nothing to do but at stage 3. Collective there."""
    sharded = [p for p in module.parameters(recurse=False) if hasattr(p, "ds_id")]
    return GatheredParameters(sharded) if sharded else nullcontext()


@torch.no_grad()
def copy_masters_to_model(wrapped: Any) -> None:
    """After masters were overwritten: bring the model's own copies in line, as the end of a step does. Collective."""
    if hasattr(wrapped, _STAGE_3):
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


def detach_from_engine(parameters: Iterable[nn.Parameter]) -> None:
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


def cast_unsharded(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is not cut yet, fresh adapters; DeepSpeed does so only in a model of which nothing is cut."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)


def gather_with_users(model: nn.Module) -> None:
    """Stage 3: what lies in a `ParameterDict`, as omegas and VeRA's vectors do, is gathered for the module that holds
    the dict and reads it.

    DeepSpeed finds such a parameter out in a forward pass of the whole model; one that begins further inside, as
    generation does, would read it empty.
    """
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ParameterDict):
                for parameter in child.parameters(recurse=False):
                    register_external_parameter(module, parameter)


def hooks(model: nn.Module) -> set[tuple[int, str, int]]:
    """The hooks registered on the model's modules, to tell later which ones an engine added."""
    return {(id(m), kind, key) for m in model.modules() for kind in _HOOK_KINDS for key in getattr(m, kind)}


def remove_hooks(model: nn.Module, keep: set[tuple[int, str, int]]) -> None:
    """Remove all hooks but those in `keep`.

    `DeepSpeedEngine.destroy` leaves its hooks on the module it wrapped (deepspeed 0.19.8; cf. DeepSpeed issues 4856 and
    7204): they would hold the old engine and its optimizer state in memory, and run in the next engine's forward. At
    stage 3 it also leaves functions on every module that call back into the old engine during backward, and that the
    next engine would take for its own; and the list of parameters that a module uses without owning them, in which
    those of adapters that are gone would stay alive.
    """
    for module in model.modules():
        for left_over in _LEFT_ON_MODULES:
            module.__dict__.pop(left_over, None)
        for kind in _HOOK_KINDS:
            registered = getattr(module, kind)
            for key in [key for key in registered if (id(module), kind, key) not in keep]:
                del registered[key]
