"""Where DeepSpeed keeps the trained parameters' float32 masters and moments at each ZeRO stage.

Only this file and engine.py use DeepSpeed's private attributes:

    stage 0, float32   no wrapper: the model's own parameters are what the optimizer updates
    stage 0, bfloat16  FP16_UnfusedOptimizer: one float32 copy per parameter
    stages 1, 2        one flat float32 partition per parameter group and rank, cut out of all its parameters in the
                       order of `round_robin_bit16_groups`
    stage 3            one flat float32 partition per sub-group and rank, every parameter in equal shards

Written against deepspeed 0.19; tests/launches/cases.py reads and writes through it at each stage.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from deepspeed.runtime.torch_autocast import autocast_if_enabled
from deepspeed.runtime.utils import register_output_backward_hooks
from deepspeed.runtime.zero import GatheredParameters, partitioned_param_coordinator, register_external_parameter
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import nn

from sparse_llm_ft.adapters.layer import SparseLoraLayer
from sparse_llm_ft.engine.shards import Master, ShardSlice
from sparse_llm_ft.model.layers import checkpointed_layers
from sparse_llm_ft.model.lean import is_lean
from sparse_llm_ft.model.meta_four_bit import state_tensors
from sparse_llm_ft.model.recompute import carry_through_hooks
from sparse_llm_ft.optim import AdapterOptimizer

Wrapped: TypeAlias = Any
"""The optimizer that `deepspeed.initialize` returns: one of four classes without types, or the one it was given."""

DeepSpeedParameter: TypeAlias = Any
"""An `nn.Parameter` with the attributes that DeepSpeed sets on it."""

_STAGES_1_AND_2, _STAGE_3 = "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"
_ATTRIBUTES, _LAYER = "update_recompute_parameters", "_sparse_llm_ft_layer"
_LEFT_ON_MODULES = (
    *("pre_bwd_fn", "post_bwd_fn", "_external_params", "ds_external_parameters", "all_parameters"),
    _LAYER,
)
_HOOK_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


DeepSpeedEngine: TypeAlias = Any
"""What `deepspeed.initialize` returns, without types."""


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's unsharded shape; stage 3 leaves an empty tensor in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def leave_views(wrapped: Wrapped) -> None:
    """Stages 1 and 2: leave parameters the views of their group's flat tensor that they are. An update overwrites it in
    place. DeepSpeed makes every view anew after each one, "just to be safe", as its source says.
    """
    if hasattr(wrapped, _STAGES_1_AND_2):
        wrapped._update_model_bit16_weights = lambda group: None


def masters(wrapped: Wrapped, optimizer: AdapterOptimizer) -> list[Master]:
    """The tensors on this rank that the optimizer updates, each with its parameter group.

    Args:
        wrapped: the optimizer that `deepspeed.initialize` returned.
        optimizer: the one that it was given.
    """
    groups = optimizer.param_groups
    if hasattr(wrapped, _STAGE_3):
        flats = enumerate(getattr(wrapped, _STAGE_3))
        return [(groups[wrapped.sub_group_to_group_id[i]], flat) for i, flat in flats]
    if hasattr(wrapped, _STAGES_1_AND_2):
        return list(zip(groups, getattr(wrapped, _STAGES_1_AND_2), strict=True))
    return [(group, parameter) for group in groups for parameter in group["params"]]  # stage 0


def shard_slices(
    wrapped: Wrapped, parameters: Mapping[str, DeepSpeedParameter], masters: Sequence[Master]
) -> dict[str, ShardSlice | None]:
    """Parameter name -> its slice in this rank's masters; None: it has none here."""
    if hasattr(wrapped, _STAGE_3):
        return {name: _slice_at_stage_3(wrapped, parameter) for name, parameter in parameters.items()}
    if is_sharded(wrapped):
        found = _slices_at_stages_1_and_2(wrapped, masters)
        return {name: found.get(id(parameter)) for name, parameter in parameters.items()}
    number = {id(parameter): i for i, parameter in enumerate(_own_of_masters(wrapped, masters))}
    return {name: ShardSlice(number[id(parameter)], 0, 0, parameter.numel()) for name, parameter in parameters.items()}


def is_sharded(wrapped: Wrapped) -> bool:
    """Whether each rank holds only a part of the masters (stages 1 to 3)."""
    return hasattr(wrapped, _STAGES_1_AND_2) or hasattr(wrapped, _STAGE_3)


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the frozen weights and of the trained ones that this rank holds. Of sharded ones its parts count,
    gathered or not, so that a resumed run counts the same. Buffers and the constants of 4-bit weights count as
    frozen.
    """
    held: dict[bool, list[torch.Tensor]] = {False: list(model.buffers()), True: []}
    for parameter in model.parameters():
        shard = getattr(parameter, "ds_tensor", None)
        constants = state_tensors(getattr(parameter, "quant_state", None))
        held[parameter.requires_grad] += [parameter.data if shard is None else shard, *constants]
    frozen, trained = ({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held[k]} for k in held)
    return sum(frozen.values()), sum(trained.values())


def flat_gradients(wrapped: Wrapped, masters: Sequence[Master]) -> list[torch.Tensor]:
    """Each master's gradients of the coming update: averaged over ranks, not yet clipped.

    Call it between the last `backward` of an accumulation and its `step`.
    """
    if not is_sharded(wrapped):
        own = _own_of_masters(wrapped, masters)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
    at_stage_3 = hasattr(wrapped, _STAGE_3)
    if wrapped.offload_optimizer if at_stage_3 else wrapped.cpu_offload:
        if not at_stage_3:
            wrapped._wait_for_offload_copies()
        return [master.grad for _, master in masters]  # type: ignore[misc]
    parts = [wrapped.averaged_gradients[i] for i in range(len(masters))]
    return [own[0] if len(own) == 1 else torch.cat([part.reshape(-1) for part in own]) for own in parts]


def forward_apart(engine: DeepSpeedEngine, batch: Mapping[str, object]) -> Any:
    """The model's output without what `DeepSpeedEngine.forward` hangs on it: hooks that begin ZeRO's part of a backward
    pass.
    """
    with autocast_if_enabled(engine):
        return engine.module(**batch)


class _Given(torch.autograd.Function):
    """0, as a function of parameters whose gradients are given."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        given = tuple(ctx.gradients)
        ctx.gradients.clear()  # a parameter's `grad` then takes over the memory, or is added to
        return None, *given


def backward_given(
    engine: DeepSpeedEngine, gradients: list[torch.Tensor], parameters: Sequence[DeepSpeedParameter]
) -> None:
    """Collective. DeepSpeed's backward pass with given gradients, one for each parameter. Empties the list.

    It does what `DeepSpeedEngine.forward` does for a loss that comes from its output.
    """
    loss: torch.Tensor = _Given.apply(gradients, *parameters)  # type: ignore[no-untyped-call]
    if hasattr(engine.optimizer, "clear_backward_seen_flag"):
        engine.optimizer.clear_backward_seen_flag()
    register_output_backward_hooks(loss, engine._backward_prologue, engine._backward_prologue_per_tensor)
    engine.backward(loss)


def _slice_at_stage_3(wrapped: Wrapped, parameter: DeepSpeedParameter) -> ShardSlice | None:
    master, offset, size = wrapped.grad_position[wrapped.get_param_id(parameter)]
    start = size * dist.get_rank(parameter.ds_process_group)  # equal shards, the last one padded
    length = min(size, parameter.ds_numel - start)
    return ShardSlice(master, offset, start, length) if length > 0 else None


def _slices_at_stages_1_and_2(wrapped: Wrapped, masters: Sequence[Master]) -> dict[int, ShardSlice]:
    """Id of a parameter -> its slice; without those that have none here.

    DeepSpeed's own record of it, `_hp_mapping`, has the parameters in another order than the partition under
    ``round_robin_gradients`` (0.19.8).
    """
    found: dict[int, ShardSlice] = {}
    for number, (_, master) in enumerate(masters):
        first = master.numel() * dist.get_rank(wrapped.real_dp_process_group[number])
        placed = zip(wrapped.round_robin_bit16_groups[number], wrapped.round_robin_bit16_offsets[number], strict=True)
        for parameter, place in placed:
            low, high = max(place, first), min(place + parameter.numel(), first + master.numel())
            if low < high:
                found[id(parameter)] = ShardSlice(number, low - first, low - place, high - low)
    return found


def _own_of_masters(wrapped: Wrapped, masters: Sequence[Master]) -> list[DeepSpeedParameter]:
    """Stage 0: each master's parameter in the model; under float32 the two are one."""
    if not hasattr(wrapped, "fp16_groups"):
        return [master for _, master in masters]
    copies = zip(wrapped.fp32_groups, wrapped.fp16_groups, strict=True)
    own = {id(c): p for group, parameters in copies for c, p in zip(group, parameters, strict=True)}
    return [own[id(master)] for _, master in masters]


def gathered(wrapped: Wrapped, module: nn.Module) -> AbstractContextManager[object]:
    """Collective at stage 3. A context in which the module's own parameters are unsharded."""
    if hasattr(wrapped, _STAGE_3):
        # A backward pass ends without releasing the weights of a layer whose input needs no gradient.
        wrapped._partition_all_parameters()
    sharded = [p for p in module.parameters(recurse=False) if hasattr(p, "ds_id")]
    return GatheredParameters(sharded) if sharded else nullcontext()


@torch.no_grad()
def set_in_model(
    wrapped: Wrapped,
    parameters: Mapping[str, DeepSpeedParameter],
    values: Mapping[str, torch.Tensor],
    shard_slices: Mapping[str, ShardSlice | None],
) -> None:
    """Set parameters as the model computes with them, whose masters have been overwritten with the same values. Every
    rank has these, so nothing is sent: DeepSpeed's own way gathers all adapters or all small parameters anew.

    Args:
        values: short name -> the full value.
    """
    if hasattr(wrapped, _STAGE_3):
        for number in sorted({shard.master for name in values if (shard := shard_slices[name]) is not None}):
            wrapped._reassign_or_swap_out_partitioned_parameters(number)  # this rank's shards
    for name, value in values.items():
        parameter = parameters[name]
        if hasattr(parameter, "ds_id"):
            parameter.ds_secondary_tensor = None  # hpZ's second shard, which the next gather makes anew
            if parameter.ds_status is not ZeroParamStatus.AVAILABLE:
                continue
        parameter.data.copy_(value)


def detach_from_engine(parameters: Iterable[nn.Parameter]) -> None:
    """Remove a destroyed engine's references from parameters that stay.

    At stages 1 and 2 a parameter is a view of its group's flat buffer and would keep all of it alive. At stage 3 every
    parameter, frozen ones included, refers to the optimizer.
    """
    # This method's cache is keyed by its object: it would keep stage 3's coordinator and every parameter it traced.
    decorated = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(decorated).nonlocals["func"].cache_clear()
    parameter: DeepSpeedParameter
    for parameter in parameters:
        for attribute in ("_z3_optimizer", "_zero_optimizer"):
            if hasattr(parameter, attribute):
                delattr(parameter, attribute)
        if hasattr(parameter, "_hp_mapping"):
            del parameter._hp_mapping
            parameter.data = parameter.data.clone()
        parameter.grad = None


def cast_unsharded(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast unsharded parameters (fresh adapters). DeepSpeed casts only in models without sharded ones."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)


def keep_recomputed(model: nn.Module) -> None:
    """Stage 3: keep the frozen weights that activation checkpointing has gathered to compute a layer again until the
    layer's backward pass is over.

    DeepSpeed 0.19.8 gives them to the module whose backward pass asked for the layer, which is the layer's last one,
    and releases them behind that module. The modules before it would gather them a third time in the same step.
    """
    for layer in checkpointed_layers(model).values():
        for module in layer.modules():
            module.__dict__[_LAYER] = layer
    if hasattr(partitioned_param_coordinator, _ATTRIBUTES):
        setattr(partitioned_param_coordinator, _ATTRIBUTES, _attribute_to_layer)


_attribute = getattr(partitioned_param_coordinator, _ATTRIBUTES, None)


def _attribute_to_layer(module: nn.Module, parameter: DeepSpeedParameter) -> None:
    """DeepSpeed's function, with the checkpointed layer around the module in its place."""
    assert _attribute is not None, "it has been replaced"
    _attribute(module.__dict__.get(_LAYER, module), parameter)


def gather_with_users(model: nn.Module) -> None:
    """Stage 3: gather parameters with the modules that read them without calling their owners.

    These are the layers with adapters, which read the base layer's weights and the adapter's, and modules that hold a
    `ParameterDict` (VeRA's vectors). DeepSpeed detects such parameters in a forward pass of the whole model. A pass
    that begins further inside, as in generation, would read them empty. DeepSpeed's hooks also come between an
    activation and its recipe.
    """
    for module in model.modules():
        read: list[nn.Module] = [child for child in module.children() if isinstance(child, nn.ParameterDict)]
        if isinstance(module, SparseLoraLayer):
            read += [module.base_layer, *(part for name in module.adapters for part in module.pair(name))]
            module.engine_hooks = max(module.count_hooks(name) for name in module.adapters)
        for parameter in (p for part in read for p in part.parameters(recurse=False)):
            register_external_parameter(module, parameter)
        if isinstance(module, SparseLoraLayer) or is_lean(module):
            carry_through_hooks(module)


def hooks(model: nn.Module) -> set[tuple[int, str, int]]:
    """The hooks on the model's modules as (id of the module, kind, key), to tell later which ones an engine added."""
    return {(id(m), kind, key) for m in model.modules() for kind in _HOOK_KINDS for key in getattr(m, kind)}


def remove_hooks(model: nn.Module, keep: set[tuple[int, str, int]]) -> None:
    """Remove all hooks but those in `keep`.

    `DeepSpeedEngine.destroy` leaves its hooks on the module it wrapped (deepspeed 0.19.8; cf. DeepSpeed issues 4856 and
    7204). They would keep the old engine and its optimizer state in memory, and run in the next engine's forward. At
    stage 3 it also leaves two things on every module: functions that call the old engine during backward, which the
    next engine would take for its own; and the list of parameters that a module uses without owning them, which would
    keep removed adapters alive.
    """
    for module in model.modules():
        if isinstance(module, SparseLoraLayer):
            module.engine_hooks = 0
        for left_over in _LEFT_ON_MODULES:
            module.__dict__.pop(left_over, None)
        remove_hooks_of(module, keep)


def remove_hooks_of(module: nn.Module, keep: set[tuple[int, str, int]]) -> None:
    """Remove the hooks of one module but for those in `keep`."""
    for kind in _HOOK_KINDS:
        registered = getattr(module, kind)
        for key in [key for key in registered if (id(module), kind, key) not in keep]:
            del registered[key]
