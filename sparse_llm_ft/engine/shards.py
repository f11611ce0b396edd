"""Reads and writes named parameters and moments in flat partitions, and allocates a shard's masked optimizer state.

A *master* is a float32 tensor that the optimizer updates: a parameter itself, or a flat partition that holds this
rank's slices of many parameters. `ShardSlice` locates one parameter's slice in a master; zero.py finds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from sparse_llm_ft.checkpoint.state import Tensors
from sparse_llm_ft.engine.host_read import HostRead
from sparse_llm_ft.optim.adapter_optimizer import AdapterOptimizer
from sparse_llm_ft.optim.masks import Mask
from sparse_llm_ft.optim.sparse_adamw import ParamGroup, index_dtype

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

    def read(self, names: Iterable[str], key: str | None = None) -> Tensors:
        """Collective. Values (None) or moments `key` of parameters: unsharded, float32, on the CPU; masked moments are
        0.
        """
        return self._assemble(names, lambda shard: self._part(shard, key))

    def begin_read(self, names: Sequence[str]) -> Callable[[], Tensors]:
        """Collective. A function that returns what `read` would now, at any later time. The values are on their way to
        the host; the function waits until they are there. It makes no collective.
        """
        on_their_way = [(b, HostRead(self._gathered(b, lambda s: self._part(s, None)))) for b in self._bundles(names)]

        def values() -> Tensors:
            found: Tensors = {}
            for bundle, flat in on_their_way:
                found |= self._split(bundle, flat.values())
            return found

        return values

    def write(self, values: Mapping[str, torch.Tensor], key: str | None = None) -> None:
        """Overwrite what `read` reads. Each rank takes its slice of a value, of a moment only the kept entries.

        Raises:
            ValueError: another shape; nothing is overwritten.
        """
        for name, value in values.items():
            if tuple(value.shape) != self.shapes[name]:
                raise ValueError(f"{name}: shape {tuple(value.shape)}; expected {self.shapes[name]}")
        targets, parts = [], []
        for name, value in values.items():
            if (shard := self.shard_slices[name]) is None:
                continue
            part = value.reshape(-1)[shard.start : shard.start + shard.length]
            kept, at = self._kept_part(shard, key)
            targets.append(self._stored(shard, key)[at])
            parts.append(part if kept is None else part.to(kept.device)[kept])
        if targets:
            torch._foreach_copy_(targets, parts)

    def gradients(self, flat: Sequence[torch.Tensor]) -> Tensors:
        """Collective. All parameters' gradients: unsharded, float32, on the CPU, masked entries included; `flat` as in
        `norm`.
        """
        parts = [gradient.reshape(-1) for gradient in flat]
        return self._assemble(self.shapes, lambda s: parts[s.master][s.offset : s.offset + s.length])

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

    def _stored(self, shard: ShardSlice, key: str | None) -> torch.Tensor:
        """The master with the slice (None), or its moments `key`: 1-D."""
        master = self.masters[shard.master][1]
        return (master if key is None else self.optimizer.state[master][key]).detach().view(-1)

    def _part(self, shard: ShardSlice, key: str | None) -> torch.Tensor:
        kept, at = self._kept_part(shard, key)
        stored = self._stored(shard, key)[at]
        if kept is None:
            return stored
        part = stored.new_zeros(shard.length)
        part[kept] = stored
        return part

    def _assemble(self, names: Iterable[str], part: Callable[[ShardSlice], torch.Tensor]) -> Tensors:
        """Collective. Parameters from the slices of all ranks: one collective and one copy to the host per bundle.

        Args:
            part: the values of one of this rank's slices, or of several that lie side by side: 1-D.
        """
        found: dict[str, torch.Tensor] = {}
        for bundle in self._bundles(names):
            found |= self._split(bundle, self._gathered(bundle, part).cpu())
        return found

    def _gathered(self, names: Sequence[str], part: Callable[[ShardSlice], torch.Tensor]) -> torch.Tensor:
        """Collective. The parameters one after the other on `device`: 1-D, float32. `part` as in `_assemble`."""
        flat = torch.zeros(sum(math.prod(self.shapes[name]) for name in names), device=self.device)
        runs = list(self._runs(names))
        if runs:
            places = [flat[place : place + shard.length] for place, shard in runs]
            torch._foreach_copy_(places, [part(shard) for _, shard in runs])
        if self.sharded:  # as integers, all but one of them 0: exact, including the sign of a zero
            dist.all_reduce(flat.view(torch.int32))
        return flat

    def _runs(self, names: Iterable[str]) -> Iterator[tuple[int, ShardSlice]]:
        """Where this rank's slices belong among the parameters one after the other. Slices that are neighbours both
        there and in their master come as one.
        """
        run: tuple[int, ShardSlice] | None = None
        at = 0
        for name in names:
            shard, place = self.shard_slices[name], at
            at += math.prod(self.shapes[name])
            if shard is None:
                continue
            if run is not None:
                first, before = run
                ends = before.master, before.offset + before.length, first + before.length
                if ends == (shard.master, shard.offset, place + shard.start):
                    run = first, replace(before, length=before.length + shard.length)
                    continue
                yield run
            run = place + shard.start, shard
        if run is not None:
            yield run

    def _split(self, names: Sequence[str], flat: torch.Tensor) -> Tensors:
        """Parameters that lie one after the other in `flat`, each in a storage of its own, as files need it."""
        sizes = [math.prod(self.shapes[name]) for name in names]
        parts = zip(names, flat.split(sizes), strict=True)
        return {name: part.view(self.shapes[name]).clone() for name, part in parts}

    def _bundles(self, names: Iterable[str]) -> Iterator[list[str]]:
        """The names in parts of no more entries than the largest parameter has. It must fit by itself, so no part needs
        more memory; and all omegas are one part.
        """
        most = max((math.prod(shape) for shape in self.shapes.values()), default=0)
        bundle: list[str] = []
        entries = 0
        for name in names:
            size = math.prod(self.shapes[name])
            if bundle and entries + size > most:
                yield bundle
                bundle, entries = [], 0
            bundle.append(name)
            entries += size
        if bundle:
            yield bundle
