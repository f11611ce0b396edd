"""Reads and writes named parameters and moments in flat partitions, and allocates a shard's masked optimizer state.

A *master* is a float32 tensor that the optimizer updates: a parameter itself, or a flat partition that holds this
rank's slices of many parameters. `ShardSlice` locates one parameter's slice in a master; zero.py finds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sparse_llm_ft.optim.adapter_optimizer import AdapterOptimizer
from sparse_llm_ft.optim.masks import Mask
from sparse_llm_ft.optim.sparse_adamw import ParamGroup, index_dtype

TOGETHER = 2**20
"""Values that are read in one message: 4 MiB."""

Master = tuple[ParamGroup, torch.Tensor]
"""A master and its parameter group."""


@dataclass(frozen=True)
class ShardSlice:
    """This rank's slice of one parameter: entries `start` to `start + length` of the flattened parameter begin at
    `offset` in master number `master`.
    """

    master: int
    offset: int
    start: int
    length: int


class Shards:
    """Allocates an optimizer's state on this rank's masters, and reads and writes it by parameter.

    Args:
        shapes: parameter name -> its unsharded shape.
        shard_slices: parameter name -> this rank's slice; None: it has none.
        masks: name -> trained entries, for parameters that are partly trained.
        sharded: whether each entry lies on one rank only; otherwise every rank holds all entries.
        device: where collectives run.

    Raises:
        ValueError: a mask of a parameter that is not trained.
    """

    def __init__(
        self,
        optimizer: AdapterOptimizer,
        masters: Sequence[Master],
        shapes: Mapping[str, tuple[int, ...]],
        shard_slices: Mapping[str, ShardSlice | None],
        masks: Mapping[str, Mask],
        sharded: bool,
        device: torch.device,
    ) -> None:
        if unknown := masks.keys() - shard_slices.keys():
            raise ValueError(f"a mask for {min(unknown)}, which is not a trained parameter")
        self.optimizer, self.masters, self.shapes, self.shard_slices = optimizer, masters, shapes, shard_slices
        self.sharded, self.device = sharded, device
        for i, (group, master) in enumerate(masters):
            optimizer.allocate_for(master, group["algorithm"], self._kept(i, master, masks))

    def read(self, name: str, key: str | None = None) -> torch.Tensor:
        """Collective. The parameter's value (None) or moment `key`: unsharded, float32; masked moments are 0."""
        ((_, value),) = self.read_all([name], key)
        return value

    def read_all(self, names: Iterable[str], key: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective. `read` of each name, in order. Small parameters come together in one message."""
        waiting: list[str] = []
        for name in names:
            if waiting and sum(map(self._numel, (*waiting, name))) > TOGETHER:
                yield from self._assembled(waiting, key)
                waiting = []
            waiting.append(name)
        if waiting:
            yield from self._assembled(waiting, key)

    def write(self, name: str, value: torch.Tensor, key: str | None = None) -> None:
        """Overwrite what `read` reads. Each rank takes its slice of `value`, of a moment only the kept entries.

        Raises:
            ValueError: another shape.
        """
        if tuple(value.shape) != self.shapes[name]:
            raise ValueError(f"{name}: shape {tuple(value.shape)}; expected {self.shapes[name]}")
        shard = self.shard_slices[name]
        if shard is None:
            return
        master = self.masters[shard.master][1]
        part = value.reshape(-1)[shard.start : shard.start + shard.length].to(master.device, torch.float32)
        kept, at = self._kept_part(shard, key)
        target = (master if key is None else self.optimizer.state[master][key]).detach().view(-1)
        target[at] = part if kept is None else part[kept]

    def gradient(self, name: str, flat: Sequence[torch.Tensor]) -> torch.Tensor:
        """Collective. A parameter's gradient: unsharded, float32, masked entries included; `flat` as in `norm`."""
        shard = self.shard_slices[name]
        part = None if shard is None else flat[shard.master].reshape(-1)[shard.offset : shard.offset + shard.length]
        return self._assemble({name: part})[name]

    def norm(self, flat: Sequence[torch.Tensor]) -> torch.Tensor:
        """Collective. Euclidean norm over the trained entries of all parameters: a float64 scalar on `device`.

        Args:
            flat: each master's gradients.
        """
        entries = [
            self.optimizer.kept_entries(master, gradient.to(master.device))
            for (_, master), gradient in zip(self.masters, flat, strict=True)
        ]
        norms = [norm.to(self.device) for norm in torch._foreach_norm(entries, dtype=torch.float32)]
        total = torch.stack(norms).square().sum()
        if self.sharded:
            dist.all_reduce(total)
        return total.double().sqrt()

    def state_tensors(self) -> list[torch.Tensor]:
        """All optimizer tensors on this rank except the masters: moments, step counts, indices."""
        states = [t for state in self.optimizer.state.values() for t in state.values()]
        return [*states, *self.optimizer.kept.values()]

    def _kept(self, number: int, master: torch.Tensor, masks: Mapping[str, Mask]) -> torch.Tensor | None:
        """Indices of a master's trained entries; None where none of its parameters is masked."""
        here = [
            (shard, masks.get(name)) for name, shard in self.shard_slices.items() if shard and shard.master == number
        ]
        if not any(mask for _, mask in here):
            return None
        parts = [
            shard.offset
            + (torch.arange(shard.length) if mask is None else mask.indices(shard.start, shard.start + shard.length))
            for shard, mask in sorted(here, key=lambda item: item[0].offset)
        ]
        return torch.cat(parts).to(master.device, index_dtype(master))

    def _kept_part(self, shard: ShardSlice, key: str | None) -> tuple[torch.Tensor | None, slice]:
        """Which of the slice's entries the tensor `key` holds (None: all), and at which positions."""
        master = self.masters[shard.master][1]
        kept = None if key is None else self.optimizer.kept.get(master)
        if kept is None:
            return None, slice(shard.offset, shard.offset + shard.length)
        edges = torch.tensor([shard.offset, shard.offset + shard.length], dtype=kept.dtype, device=kept.device)
        low, high = torch.searchsorted(kept, edges).tolist()
        return kept[low:high] - shard.offset, slice(low, high)

    def _part(self, shard: ShardSlice, key: str | None) -> torch.Tensor:
        master = self.masters[shard.master][1]
        kept, at = self._kept_part(shard, key)
        stored = (master if key is None else self.optimizer.state[master][key]).detach().view(-1)[at]
        if kept is None:
            return stored
        part = stored.new_zeros(shard.length)
        part[kept] = stored
        return part

    def _numel(self, name: str) -> int:
        return math.prod(self.shapes[name])

    def _assembled(self, names: Sequence[str], key: str | None) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective. Values or moments in one message."""
        shards = {name: self.shard_slices[name] for name in names}
        parts = {name: None if shard is None else self._part(shard, key) for name, shard in shards.items()}
        yield from self._assemble(parts).items()

    def _assemble(self, parts: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Collective. Parameters from the slices of all ranks, in one message. Each has memory of its own."""
        together = torch.zeros(sum(map(self._numel, parts)), device=self.device)
        whole = dict(zip(parts, together.split([self._numel(name) for name in parts]), strict=True))
        for name, part in parts.items():
            shard = self.shard_slices[name]
            if part is not None and shard is not None:
                whole[name][shard.start : shard.start + shard.length] = part.to(self.device, torch.float32)
        if self.sharded:  # as integers, all but one of them 0: exact, including the sign of a zero
            dist.all_reduce(together.view(torch.int32))
        own = whole if len(whole) == 1 else {name: value.clone() for name, value in whole.items()}
        return {name: value.view(self.shapes[name]) for name, value in own.items()}
