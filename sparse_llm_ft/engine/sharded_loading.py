"""ZeRO stage 3: load a base so that no rank ever holds more than its shard and the module that is being read.

transformers shards a base during loading only if nothing is quantised, and even then rank 0 first reads all of it. A
4-bit base is loaded in full by every rank (peft#1844). Here transformers' own loader runs through the checkpoint,
tensor by tensor, with its renamings, conversions, quantiser, tied and fresh weights. Two things differ:

    reading   the first rank of each node reads a tensor, in slices, and sends the others what they need of it
              (shared_files.py)
    4 bit     each rank of a node gets and quantises a part of a weight (split_quantization.py)
    setting   DeepSpeed shards a parameter at once, without sending it again from rank 0; the full one is freed
              before the next is read

So every value is bit by bit what it is without sharding. bitsandbytes keeps the scales of a 4-bit weight (one byte for
64 values) beside the weight. They become a parameter of the layer, sharded and gathered like the weight itself.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel, core_model_loading, modeling_utils
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.pytorch_utils import Conv1D

from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.data.tasks.mode import CAUSAL_LM, TaskMode
from sparse_llm_ft.engine.shared_files import SLICE_BYTES, Layout, Node, Reads, ShardLayout, SharedFile, node_of
from sparse_llm_ft.engine.split_quantization import SplitQuantizer
from sparse_llm_ft.io.wait import Wait
from sparse_llm_ft.model.loading import DTYPES, device, load_model, load_tokenizer, silence
from sparse_llm_ft.model.resizing import grow_embeddings, token_count


def load_sharded_model(
    config: ModelConfig,
    deepspeed_settings: Mapping[str, object],
    task_mode: TaskMode = CAUSAL_LM,
    seed: int = 0,
    node: str | None = None,
    reads: Reads | None = None,
    wait: Wait | None = None,
) -> PreTrainedModel:
    """Collective. `load_model`, with every parameter of the checkpoint already sharded.

    Forward passes need an engine's hooks. Every rank reads weights that are not safetensors files.

    Args:
        deepspeed_settings: of the engine that will be built around the model.
        node: processes with the same name share one reading of the files; None: those of one host.
        reads: counts what this process reads.
        wait: shows the progress, in bytes; None: nothing does.

    Raises:
        ConfigError: weights that cannot be loaded, on this rank or another.
    """
    with node_of(node or socket.gethostname()) as readers, ExitStack() as stack:
        reads = Reads() if reads is None else reads
        quantizer = SplitQuantizer(
            readers.size, readers.rank, readers.exchange, SLICE_BYTES // DTYPES[config.dtype].itemsize
        )
        shard = _sharder(deepspeed_settings)
        parts = _NeededParts(readers, quantizer, _has_plain_shards(deepspeed_settings))
        for name, replacement in (
            ("safe_open", lambda path, *_, **__: SharedFile(path, readers, reads, parts.layout)),
            ("caching_allocator_warmup", lambda *_: None),  # it would allocate the whole model on every rank
        ):
            stack.enter_context(mock.patch.object(modeling_utils, name, replacement))
        # Every release of transformers calls it to check that tied weights have one value.
        stack.enter_context(mock.patch.object(torch, "equal", partial(_shards_are_equal, torch.equal)))
        stack.enter_context(quantizer.installed())
        stack.enter_context(parts.noted())
        # Reading is a collective: one tensor after the other, in this thread.
        stack.enter_context(mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"))
        with _shard_what_is_set(shard):
            model = load_model(config.model_copy(update={"resize_embeddings": False}), task_mode, seed, wait)
    if config.resize_embeddings:

        def place(parameter: nn.Parameter) -> None:
            parameter.data = parameter.data.to(device())
            shard(parameter)

        with silence():
            grow_embeddings(model, token_count(load_tokenizer(config, task_mode)), seed, _gathered, place)
    return model


def gathered_copy(parameter: nn.Parameter) -> torch.Tensor:
    """Collective. A full copy of a parameter on the CPU, as float32, whether or not it is sharded."""
    return _gathered(parameter).float()


def _gathered(parameter: nn.Parameter) -> torch.Tensor:
    """Collective. `gathered_copy`, in the parameter's own type."""
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().cpu().clone()


class _NeededParts:
    """What this node's processes need of the tensor that transformers is about to read.

    Args:
        plain_shards: whether a process keeps no more of a parameter than one shard of as many as there are processes.
    """

    def __init__(self, node: Node, quantizer: SplitQuantizer, plain_shards: bool) -> None:
        self.node, self.quantizer, self.plain_shards = node, quantizer, plain_shards
        self._next: Literal["quantised", "sharded"] | None = None

    def layout(self, value: torch.Tensor) -> Layout | None:
        """The parts of `value`, which will be filled; None: all of it."""
        if self._next == "quantised":
            return self.quantizer.division(value.numel())
        if self._next == "sharded" and self.plain_shards and value.nbytes > SLICE_BYTES:
            size = max(1, SLICE_BYTES // value.element_size() // self.node.size)
            return ShardLayout(value.numel(), -(-value.numel() // dist.get_world_size()), self.node.members, size)
        return None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """A context in which this object knows what transformers makes of each tensor."""
        convert = core_model_loading.WeightRenaming.convert

        def noting(mapping: Any, name: str, model: PreTrainedModel | None = None, **options: Any) -> Any:
            self._next = None if model is None else self._becomes(mapping, name, model)
            try:
                return convert(mapping, name, model=model, **options)
            finally:
                self._next = None

        with mock.patch.object(core_model_loading.WeightRenaming, "convert", noting):
            yield

    def _becomes(self, mapping: Any, name: str, model: PreTrainedModel) -> Literal["quantised", "sharded"] | None:
        module = model.get_submodule(name.rpartition(".")[0])
        if type(mapping.quantization_operation) is Bnb4bitQuantize:
            transposed = issubclass(getattr(module, "source_cls", Conv1D), Conv1D)  # before it is quantised
            return None if transposed else "quantised"
        is_parameter = module._parameters.get(name.rpartition(".")[2]) is not None
        return "sharded" if mapping.quantization_operation is None and is_parameter else None


def _has_plain_shards(settings: Mapping[str, object]) -> bool:
    """Whether DeepSpeed's settings ask for neither second shards (hpZ) nor shards within groups (MiCS)."""
    given = settings["zero_optimization"]
    assert isinstance(given, Mapping)
    return given.get("zero_hpz_partition_size", 1) <= 1 and given.get("mics_shard_size", -1) <= 0


def _sharder(settings: Mapping[str, object]) -> Callable[[nn.Parameter], None]:
    """Collective. A function, collective too, that shards one parameter as DeepSpeed does."""
    first: Any = nn.Parameter(torch.zeros(1))
    deepspeed.zero.Init(module=nn.ParameterList([first]), config_dict_or_path=dict(settings))

    def shard(parameter: nn.Parameter) -> None:
        memory = parameter.data.untyped_storage()
        alone = memory.nbytes() == parameter.data.nbytes
        # DeepSpeed would send rank 0's values to all. Here each rank has its own part of them, and not always more.
        with mock.patch.object(partition_parameters.dist, "broadcast", lambda *_, **__: None):
            first.convert_to_zero_parameters(param_list=[parameter])
        if alone:  # transformers' loop refers to it until it has read the next one
            memory.resize_(0)

    return shard


@contextmanager
def _shard_what_is_set(shard: Callable[[nn.Parameter], None]) -> Iterator[None]:
    """Collective. A context in which every parameter set on a module is sharded, unless it is on the meta device."""

    def on_set(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is None or parameter.is_meta or hasattr(parameter, "ds_id"):
            return
        if not getattr(parameter, "_is_hf_initialized", False):
            return  # the checkpoint lacks it: transformers draws all its values next, and the engine shards it
        shard(parameter)
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            state.absmax = nn.Parameter(state.absmax, requires_grad=False)
            state.absmax._is_hf_initialized = True
            module.register_parameter(f"{name}_absmax", state.absmax)

    hook = register_module_parameter_registration_hook(on_set)
    try:
        yield
    finally:
        hook.remove()


def _shards_are_equal(
    equal: Callable[[torch.Tensor, torch.Tensor], bool], one: torch.Tensor, other: torch.Tensor
) -> bool:
    """Collective for sharded parameters. `torch.equal` would compare the empty tensors that stand in their place."""
    if not (hasattr(one, "ds_tensor") and hasattr(other, "ds_tensor")):
        return equal(one, other)
    flag = torch.tensor([equal(one.ds_tensor, other.ds_tensor)], dtype=torch.int32, device=device())
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag.item())
