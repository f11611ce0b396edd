"""ZeRO stage 3: load a base so that no rank ever holds more than its shard and the module that is being read.

transformers shards a base during loading only if nothing is quantised, and even then rank 0 first reads all of it. A
4-bit base is loaded in full by every rank (peft#1844). Here transformers' own loader runs through the checkpoint,
tensor by tensor, with its renamings, conversions, quantiser, tied and fresh weights. Two things differ:

    reading   the first rank of each node reads a tensor, in slices, and sends it to the node's other ranks
    4 bit     each rank of a node gets and quantises a part of a weight (split_quantization.py)
    setting   DeepSpeed shards a parameter at once; the full one is freed before the next is read

So every value is bit by bit what it is without sharding. bitsandbytes keeps the scales of a 4-bit weight (one byte for
64 values) beside the weight. They become a parameter of the layer, sharded and gathered like the weight itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from pathlib import Path
from types import TracebackType
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel, modeling_utils

from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.data.tasks.mode import CAUSAL_LM, TaskMode
from sparse_llm_ft.engine.split_quantization import Division, SplitQuantizer
from sparse_llm_ft.model.loading import DTYPES, device, load_model, load_tokenizer, silence
from sparse_llm_ft.model.loading_progress import Begin
from sparse_llm_ft.model.resizing import grow_embeddings, token_count

SLICE_BYTES = 16 * 2**20
"""Bytes of a tensor that are read at a time. Host memory holds no more of a tensor that goes to a GPU."""


_Contents = dict[str, tuple[list[int], str, int]]
"""Tensor name -> its sizes, its type's name, and where it begins in the file."""


@dataclass
class Reads:
    """Counts what this process reads from files.

    Attributes:
        tensors: name -> number of reads.
    """

    tensors: Counter[str] = field(default_factory=Counter)
    bytes: int = 0


def load_sharded_model(
    config: ModelConfig,
    deepspeed_settings: Mapping[str, object],
    task_mode: TaskMode = CAUSAL_LM,
    seed: int = 0,
    node: str | None = None,
    reads: Reads | None = None,
    bar: Begin | None = None,
) -> PreTrainedModel:
    """Collective. `load_model`, with every parameter of the checkpoint already sharded.

    Forward passes need an engine's hooks. Every rank reads weights that are not safetensors files.

    Args:
        deepspeed_settings: of the engine that will be built around the model.
        node: processes with the same name share one reading of the files; None: those of one host.
        reads: counts what this process reads.
        bar: shows the progress; None: nothing does.

    Raises:
        ConfigError: weights that cannot be loaded, on this rank or another.
    """
    with _node(node or socket.gethostname()) as readers, ExitStack() as stack:
        reads = Reads() if reads is None else reads
        quantizer = SplitQuantizer(
            readers.size, readers.rank, readers.exchange, SLICE_BYTES // DTYPES[config.dtype].itemsize
        )
        for name, replacement in (
            ("safe_open", lambda path, *_, **__: _SharedFile(path, readers, reads, quantizer)),
            ("caching_allocator_warmup", lambda *_: None),  # it would allocate the whole model on every rank
        ):
            stack.enter_context(mock.patch.object(modeling_utils, name, replacement))
        # Every release of transformers calls it to check that tied weights have one value.
        stack.enter_context(mock.patch.object(torch, "equal", partial(_shards_are_equal, torch.equal)))
        stack.enter_context(quantizer.installed())
        # Reading is a collective: one tensor after the other, in this thread.
        stack.enter_context(mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"))
        shard = _sharder(deepspeed_settings)
        with _shard_what_is_set(shard):
            model = load_model(config.model_copy(update={"resize_embeddings": False}), task_mode, seed, bar)
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


@dataclass(frozen=True)
class _Node:
    """The processes that share one reading.

    Attributes:
        group: theirs; None: all processes.
        reader: the one that reads, by its rank among all processes.
        size, rank: how many they are, and this one's number among them.
    """

    group: dist.ProcessGroup | None
    reader: int
    size: int
    rank: int

    @property
    def reads(self) -> bool:
        return dist.get_rank() == self.reader

    def send(self, value: torch.Tensor) -> None:
        """Collective. Fill `value` with the reader's."""
        dist.broadcast(value.view(torch.uint8), self.reader, group=self.group)

    def deal(self, value: torch.Tensor | None, own: torch.Tensor) -> None:
        """Collective. Fill each process's `own` with its part of the reader's `value`, (processes, len(own))."""
        parts = None if value is None else list(value.unbind())
        dist.scatter(own, parts, self.reader, group=self.group)

    def exchange(self, own: torch.Tensor) -> torch.Tensor:
        """Collective. Everyone's `own`, (n,) of one size: (processes, n)."""
        gathered = own.new_empty(self.size, len(own))
        dist.all_gather(list(gathered.unbind()), own, group=self.group)
        return gathered

    def send_json(self, value: _Contents) -> _Contents:
        """Collective. The reader's value on every rank. No object collective: those unpickle what they receive."""
        data = json.dumps(value).encode() if self.reads else b""
        length = torch.tensor([len(data)], device=device())
        dist.broadcast(length, self.reader, group=self.group)
        shared = torch.zeros(int(length), dtype=torch.uint8, device=device())
        if self.reads:
            shared.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(shared, self.reader, group=self.group)
        return json.loads(bytes(shared.cpu().numpy()))


@contextmanager
def _node(name: str) -> Iterator[_Node]:
    """Collective. A context with the processes that share this process's node name."""
    own = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    numbers = [torch.zeros(1, dtype=torch.int64, device=device()) for _ in range(dist.get_world_size())]
    dist.all_gather(numbers, torch.tensor([own], device=device()))
    nodes = [int(number) for number in numbers]
    members = {node: [rank for rank, its in enumerate(nodes) if its == node] for node in dict.fromkeys(nodes)}
    if len(members) == 1:
        yield _Node(None, 0, len(nodes), dist.get_rank())
        return
    groups = {node: dist.new_group(ranks) for node, ranks in members.items()}
    try:
        yield _Node(groups[own], members[own][0], len(members[own]), members[own].index(dist.get_rank()))
    finally:
        dist.destroy_process_group(groups[own])


class _SharedFile:
    """The part of `safetensors.safe_open` that transformers uses. Only the node's reader opens the file. Creating it is
    a collective.
    """

    def __init__(self, path: str | os.PathLike[str], node: _Node, reads: Reads, quantizer: SplitQuantizer) -> None:
        self.node, self.tally, self.quantizer = node, reads, quantizer
        self.file: FileIO | None = None
        contents: _Contents = {}

        def look() -> None:
            with safe_open(path, framework="pt"):  # checks that the file's header and length fit
                pass
            # safetensors does not do the reading: what it has read of a memory map stays resident until the file is
            # closed, and without a map it reads the full tensor for each slice.
            self.file = Path(path).open("rb", buffering=0)  # noqa: SIM115  (closed in __exit__)
            length = int.from_bytes(self.file.read(8), "little")
            for name, entry in json.loads(self.file.read(length)).items():
                if name != "__metadata__":
                    contents[name] = entry["shape"], entry["dtype"], 8 + length + entry["data_offsets"][0]

        _run_or_fail_together(look if node.reads else None)
        self.contents = node.send_json(contents)

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self.contents)

    def get_slice(self, name: str) -> _SharedTensor:
        """A handle on a tensor that is not read yet."""
        return _SharedTensor(self, name)

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.file is not None:
            self.file.close()


class _SharedTensor:
    """A tensor of a file. transformers asks for all of it, ``[...]``, and then for a device and a type."""

    def __init__(self, file: _SharedFile, name: str) -> None:
        self.file, self.name = file, name
        self.shape, self.type, self.start = file.contents[name]
        self.stored = modeling_utils.str_to_torch_dtype[self.type]

    def get_shape(self) -> list[int]:
        """Sizes, as safetensors returns them."""
        return self.shape

    def get_dtype(self) -> str:
        """The type's name, as safetensors returns it: ``BF16``."""
        return self.type

    def __getitem__(self, index: object) -> _SharedTensor:
        if index is not Ellipsis:
            raise NotImplementedError(f"{self.name}: only full tensors can be read sharded, not [{index}]")
        return self

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Collective. The node's reader reads the tensor and sends it to the others."""
        value = torch.empty(self.shape, dtype=dtype or self.stored, device=device)
        if value.is_meta:
            return value
        if self.file.quantizer.reads_own_part:
            self._fill_own_part(value.view(-1))
            return value
        _run_or_fail_together((lambda: self._read(value)) if self.file.node.reads else None)
        if value.numel():
            self.file.node.send(value)
        return value

    def _read(self, value: torch.Tensor) -> None:
        """Read the file into `value`, slice by slice."""
        assert self.file.file is not None, "only the reader reads"
        self.file.file.seek(self.start)
        for part in value.view(-1).split(SLICE_BYTES // self.stored.itemsize):
            part.copy_(self._next(len(part)))
        self.file.tally.tensors[self.name] += 1

    def _fill_own_part(self, flat: torch.Tensor) -> None:
        """Collective. Fill the slices of `flat` (values,) that this process quantises; nothing else is touched, so on a
        CPU the rest takes no memory.
        """
        node, division = self.file.node, self.file.quantizer.division(len(flat))
        own = torch.empty(division.size, dtype=self.stored, device=flat.device)
        failure: Exception | None = None  # the other processes wait for a slice whether or not it could be read
        for turn in range(division.rounds):
            round_of_all = None
            if node.reads:
                round_of_all = torch.zeros(node.size * division.size, dtype=self.stored)
                try:
                    if failure is None:
                        self._read_round(round_of_all, division, turn)
                except OSError as error:
                    failure = error
                round_of_all = round_of_all.view(torch.uint8).view(node.size, -1).to(flat.device)
            node.deal(round_of_all, own.view(torch.uint8))
            place = division.slice_of(turn, node.rank)
            flat[place] = own[: place.stop - place.start]
        _run_or_fail_together(partial(_raise, failure) if failure is not None else None)
        if node.reads:
            self.file.tally.tensors[self.name] += 1

    def _read_round(self, values: torch.Tensor, division: Division, turn: int) -> None:
        """Read the values of one round into the beginning of `values`."""
        assert self.file.file is not None, "only the reader reads"
        if turn == 0:
            self.file.file.seek(self.start)
        count = division.round(turn).stop - division.round(turn).start
        values[:count] = self._next(count)

    def _next(self, count: int) -> torch.Tensor:
        """The file's next `count` values, as they are stored."""
        file = self.file.file
        assert file is not None, "only the reader reads"
        piece = torch.empty(count * self.stored.itemsize, dtype=torch.uint8)
        rest = memoryview(piece.numpy())  # type: ignore[arg-type]
        while rest:
            read = file.readinto(rest)
            if not read:
                raise OSError(f"{file.name!s} ends within {self.name}")
            rest, self.file.tally.bytes = rest[read:], self.file.tally.bytes + read
        return piece.view(self.stored)


def _raise(failure: Exception) -> None:
    raise failure


def _run_or_fail_together(action: Callable[[], None] | None) -> None:
    """Collective. Run `action` on the ranks that have one; if it fails on one rank, all raise.

    Raises:
        OSError: with the reason, on ranks that know it.
    """
    failure: Exception | None = None
    try:
        if action is not None:
            action()
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        failure = error
    flag = torch.tensor([failure is not None], dtype=torch.int32, device=device())
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    if flag.item():
        raise OSError(str(failure or "another process could not read its weights"))


def _sharder(settings: Mapping[str, object]) -> Callable[[nn.Parameter], None]:
    """Collective. A function, collective too, that shards one parameter as DeepSpeed does."""
    first = nn.Parameter(torch.zeros(1))
    deepspeed.zero.Init(module=nn.ParameterList([first]), config_dict_or_path=dict(settings))

    def shard(parameter: nn.Parameter) -> None:
        memory = parameter.data.untyped_storage()
        alone = memory.nbytes() == parameter.data.nbytes
        first.convert_to_zero_parameters(  # type: ignore[attr-defined]
            param_list=[parameter]
        )
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
