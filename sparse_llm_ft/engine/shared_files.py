"""Files of weights that one process of each node reads, for all of them.

What becomes of a tensor decides what a process needs of it (`Layout`): the slices that it quantises, its own shard, or
all of it. The reader reads every slice once and sends it to the one process that needs it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from transformers import modeling_utils

from sparse_llm_ft.distributed.collectives import first_failure
from sparse_llm_ft.model.loading import device

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


class Layout(Protocol):
    """Which values of a flat tensor each process of a node needs: in every round at most `size`."""

    @property
    def rounds(self) -> int:
        """How many rounds there are."""
        ...

    @property
    def size(self) -> int:
        """Most values that a process gets in a round."""
        ...

    def slice_of(self, turn: int, rank: int) -> slice:
        """What the node's process number `rank` gets in round `turn`."""
        ...


@dataclass(frozen=True)
class ShardLayout:
    """Every process needs its shard of a tensor alone.

    Attributes:
        total: values of the tensor.
        shard: values of a shard; the last one may be shorter.
        owners: of the node's processes, their ranks among all, which are the numbers of their shards.
        size: values of a round.
    """

    total: int
    shard: int
    owners: tuple[int, ...]
    size: int

    @property
    def rounds(self) -> int:
        """Rounds until the largest shard is complete."""
        return -(-self.shard // self.size)

    def slice_of(self, turn: int, rank: int) -> slice:
        """A part of the shard of the node's process number `rank`."""
        first = self.owners[rank] * self.shard
        end = min(first + self.shard, self.total)
        start = min(first + turn * self.size, end)
        return slice(start, min(start + self.size, end))


@dataclass(frozen=True)
class Node:
    """The processes that share one reading.

    Attributes:
        group: theirs; None: all processes.
        members: their ranks among all processes; the first one reads.
    """

    group: dist.ProcessGroup | None
    members: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many processes the node has."""
        return len(self.members)

    @property
    def rank(self) -> int:
        """This process's number among them."""
        return self.members.index(dist.get_rank())

    @property
    def reader(self) -> int:
        """The process that reads, by its rank among all."""
        return self.members[0]

    @property
    def reads(self) -> bool:
        """Whether this process reads."""
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
def node_of(name: str) -> Iterator[Node]:
    """Collective. A context with the processes that share this process's node name."""
    own = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    numbers = [torch.zeros(1, dtype=torch.int64, device=device()) for _ in range(dist.get_world_size())]
    dist.all_gather(numbers, torch.tensor([own], device=device()))
    nodes = [int(number) for number in numbers]
    members = {node: [rank for rank, its in enumerate(nodes) if its == node] for node in dict.fromkeys(nodes)}
    if len(members) == 1:
        yield Node(None, tuple(range(len(nodes))))
        return
    groups = {node: dist.new_group(ranks) for node, ranks in members.items()}
    try:
        yield Node(groups[own], tuple(members[own]))
    finally:
        dist.destroy_process_group(groups[own])


class SharedFile:
    """The part of `safetensors.safe_open` that transformers uses. Only the node's reader opens the file. Creating it is
    a collective.

    Args:
        reads: counts what this process reads.
        layout: given the tensor that is to be filled, says what each process needs of it; None: all.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        node: Node,
        reads: Reads,
        layout: Callable[[torch.Tensor], Layout | None] = lambda _: None,
    ) -> None:
        self.node, self.tally, self.layout = node, reads, layout
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

        run_or_fail_together(look if node.reads else None)
        self.contents = node.send_json(contents)

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self.contents)

    def get_slice(self, name: str) -> SharedTensor:
        """A handle on a tensor that is not read yet."""
        return SharedTensor(self, name)

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.file is not None:
            self.file.close()


class SharedTensor:
    """A tensor of a file. transformers asks for all of it, ``[...]``, and then for a device and a type."""

    def __init__(self, file: SharedFile, name: str) -> None:
        self.file, self.name = file, name
        self.shape, self.type, self.start = file.contents[name]
        self.stored = modeling_utils.str_to_torch_dtype[self.type]

    def get_shape(self) -> list[int]:
        """Sizes, as safetensors returns them."""
        return self.shape

    def get_dtype(self) -> str:
        """The type's name, as safetensors returns it: ``BF16``."""
        return self.type

    def __getitem__(self, index: object) -> SharedTensor:
        if index is not Ellipsis:
            raise NotImplementedError(f"{self.name}: only full tensors can be read sharded, not [{index}]")
        return self

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Collective. The node's reader reads the tensor and sends it to the others."""
        value = torch.empty(self.shape, dtype=dtype or self.stored, device=device)
        if value.is_meta:
            return value
        layout = self.file.layout(value)
        if layout is not None:
            self._deal(value.view(-1), layout)
            return value
        run_or_fail_together((lambda: self._read(value)) if self.file.node.reads else None)
        if value.numel():
            self.file.node.send(value)
        return value

    def _read(self, value: torch.Tensor) -> None:
        """Read the file into `value`, slice by slice."""
        step, flat = SLICE_BYTES // self.stored.itemsize, value.view(-1)
        for start in range(0, len(flat), step):
            part = flat[start : start + step]
            part.copy_(self._values(start, len(part)))
        self.file.tally.tensors[self.name] += 1

    def _deal(self, flat: torch.Tensor, layout: Layout) -> None:
        """Collective. Fill this process's slices of `flat` (values,). Nothing else is touched: on a CPU it takes no
        memory.
        """
        node, failure = self.file.node, None
        own = torch.empty(layout.size, dtype=self.stored, device=flat.device)
        for turn in range(layout.rounds):
            of_all = None
            if node.reads:
                of_all = torch.zeros(node.size, layout.size, dtype=self.stored)
                try:
                    for rank in range(node.size if failure is None else 0):
                        place = layout.slice_of(turn, rank)
                        count = place.stop - place.start
                        of_all[rank, :count] = self._values(place.start, count)
                except OSError as error:  # the others wait for their slices all the same
                    failure = error
                of_all = of_all.view(torch.uint8).to(flat.device)
            node.deal(of_all, own.view(torch.uint8))
            place = layout.slice_of(turn, node.rank)
            flat[place] = own[: place.stop - place.start]
        run_or_fail_together(None if failure is None else partial(_raise, failure))
        if node.reads:
            self.file.tally.tensors[self.name] += 1

    def _values(self, start: int, count: int) -> torch.Tensor:
        """`count` values of the tensor, beginning with number `start`, as they are stored."""
        file = self.file.file
        assert file is not None, "only the reader reads"
        file.seek(self.start + start * self.stored.itemsize)
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


def run_or_fail_together(action: Callable[[], None] | None) -> None:
    """Collective. Run `action` on the ranks that have one; if it fails on one rank, all raise.

    Raises:
        OSError: with the reason.
    """
    failure: Exception | None = None
    try:
        if action is not None:
            action()
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        failure = error
    reason = first_failure(failure)
    if reason is not None:
        raise OSError(reason if failure is None else str(failure))
