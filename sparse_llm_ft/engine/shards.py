"""Named tensors and what an optimizer holds of them in flat partitions: masks and moments of a shard, reads and writes.

A *master* is a float32 tensor that the optimizer updates: a parameter itself, or a flat partition in which ZeRO has
laid this rank's part of many. `ShardSlice` says where one parameter's entries lie in it; zero.py finds that out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sparse_llm_ft.optim.adapter_optimizer import AdapterOptimizer
from sparse_llm_ft.optim.masks import Mask
from sparse_llm_ft.optim.sparse_adamw import index_dtype

Group = dict[str, Any]
Master = tuple[Group, torch.Tensor]
"""A master and its parameter group."""


@dataclass(frozen=True)
class ShardSlice:
    """This rank's part of one parameter: entries `start` to `start + length` of the flattened parameter lie in master
    number `master` from `offset` on.
    """

    master: int
    offset: int
    start: int
    length: int


class Shards:
    """Allocates an optimizer's state on this rank's masters, and reads and writes it by parameter.

    All ranks call the methods together: where parameters are cut into shards, reading is a collective.

    Args:
        shapes: parameter name -> its whole shape.
        shard_slices: parameter name -> where this rank's part lies; None: it has none.
        masks: of the parameters that are not trained whole.
        sharded: whether every entry lies on one rank only. If not, each rank holds all of them.
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
            raise ValueError(f"a mask for {min(unknown)}, which is no trained parameter")
        self.optimizer, self.masters, self.shapes, self.shard_slices = optimizer, masters, shapes, shard_slices
        self.sharded, self.device = sharded, device
        for i, (group, master) in enumerate(masters):
            optimizer.allocate_for(master, group["algorithm"], self._kept(i, master, masks))

    def read(self, name: str, key: str | None = None) -> torch.Tensor:
        """The parameter's value (None) or moment `key`, whole, float32; a masked entry's moment is 0."""
        place = self.shard_slices[name]
        return self._assemble(name, None if place is None else self._part(place, key))

    def write(self, name: str, value: torch.Tensor, key: str | None = None) -> None:
        """Overwrite what `read` reads; each rank takes its part of `value`. What belongs to masked entries of a moment
        is left out.

        Raises:
            ValueError: another shape.
        """
        if tuple(value.shape) != self.shapes[name]:
            raise ValueError(f"{name}: shape {tuple(value.shape)}; expected {self.shapes[name]}")
        place = self.shard_slices[name]
        if place is None:
            return
        master = self.masters[place.master][1]
        part = value.reshape(-1)[place.start : place.start + place.length].to(master.device, torch.float32)
        kept, at = self._kept_part(place, key)
        target = (master if key is None else self.optimizer.state[master][key]).detach().view(-1)
        target[at] = part if kept is None else part[kept]

    def gradient(self, name: str, flat: Sequence[torch.Tensor]) -> torch.Tensor:
        """Whole gradient of a parameter, float32, masked entries included; `flat` as of `norm`."""
        place = self.shard_slices[name]
        part = None if place is None else flat[place.master].reshape(-1)[place.offset : place.offset + place.length]
        return self._assemble(name, part)

    def norm(self, flat: Sequence[torch.Tensor]) -> float:
        """Euclidean norm over the trained entries of all parameters on all ranks.

        Args:
            flat: the gradients of each master.
        """
        total = torch.zeros(1, device=self.device)
        for (_, master), gradient in zip(self.masters, flat, strict=True):
            entries = self.optimizer.kept_entries(master, gradient.to(master.device))
            total += entries.float().square().sum().to(self.device)
        if self.sharded:
            dist.all_reduce(total)
        return float(total) ** 0.5

    def state_tensors(self) -> list[torch.Tensor]:
        """Everything the optimizer holds on this rank beside the masters: moments, step counts, indices."""
        states = [t for state in self.optimizer.state.values() for t in state.values()]
        return [*states, *self.optimizer.kept.values()]

    def _kept(self, number: int, master: torch.Tensor, masks: Mapping[str, Mask]) -> torch.Tensor | None:
        """The trained entries of a master; None where none of its parameters is masked."""
        here = [
            (place, masks.get(name)) for name, place in self.shard_slices.items() if place and place.master == number
        ]
        if not any(mask for _, mask in here):
            return None
        parts = [
            place.offset
            + (torch.arange(place.length) if mask is None else mask.indices(place.start, place.start + place.length))
            for place, mask in sorted(here, key=lambda item: item[0].offset)
        ]
        return torch.cat(parts).to(master.device, index_dtype(master))

    def _kept_part(self, place: ShardSlice, key: str | None) -> tuple[torch.Tensor | None, slice]:
        """Which of the place's entries the tensor `key` holds (None: all), and where it holds them."""
        master = self.masters[place.master][1]
        kept = None if key is None else self.optimizer.kept.get(master)
        if kept is None:
            return None, slice(place.offset, place.offset + place.length)
        edges = torch.tensor([place.offset, place.offset + place.length], dtype=kept.dtype, device=kept.device)
        low, high = torch.searchsorted(kept, edges).tolist()
        return kept[low:high] - place.offset, slice(low, high)

    def _part(self, place: ShardSlice, key: str | None) -> torch.Tensor:
        master = self.masters[place.master][1]
        kept, at = self._kept_part(place, key)
        stored = (master if key is None else self.optimizer.state[master][key]).detach().view(-1)[at]
        if kept is None:
            return stored
        part = stored.new_zeros(place.length)
        part[kept] = stored
        return part

    def _assemble(self, name: str, part: torch.Tensor | None) -> torch.Tensor:
        """One parameter from the parts on all ranks."""
        place, shape = self.shard_slices[name], self.shapes[name]
        whole = torch.zeros(torch.Size(shape).numel(), device=self.device)
        if part is not None and place is not None:
            whole[place.start : place.start + place.length] = part.to(self.device, torch.float32)
        if self.sharded:  # as integers, of which all but one are 0: exact, the sign of a zero included
            dist.all_reduce(whole.view(torch.int32))
        return whole.view(shape)
