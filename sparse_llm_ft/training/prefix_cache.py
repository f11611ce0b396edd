"""Losses whose forward pass begins at the lowest layer with an adapter, from hidden states computed once for a sample.

Every rank keeps the states of samples that it was the first to compute. Which rank sees a sample changes from epoch to
epoch, so ranks send each other what a micro-batch needs. Nothing must be asked for this: the sampler tells every rank
the share of every other one, and so all of them keep the same record of who has what.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sparse_llm_ft.config import TrainingConfig
from sparse_llm_ft.data.collate import Batch
from sparse_llm_ft.data.sampler import StepIndices
from sparse_llm_ft.distributed.collectives import broadcast_int, run_on_every_rank
from sparse_llm_ft.engine.host_read import HostRead
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.model.architecture import base_of
from sparse_llm_ft.model.loading import DTYPES
from sparse_llm_ft.model.prefix import Prefix, lowest_trained
from sparse_llm_ft.objectives.base import Forward
from sparse_llm_ft.training.loop import Loop
from sparse_llm_ft.training.prefix_store import DiskStore, MemoryStore
from sparse_llm_ft.training.read_ahead import ReadAhead

LossOf = Callable[[Forward, Batch], torch.Tensor]
Turn = Sequence[Sequence[int]]
"""The samples of every rank in one micro-batch."""

_NOBODY = -1
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class PrefixCache:
    """The losses of a phase's loop, with its states.

    The first micro-batch is computed in both ways: a model whose upper layers take more from the lower ones than hidden
    states (keys and values, say) would compute something else from them.

    Args:
        lowest: the layer at which cached passes begin.
        limit: most bytes on each rank.

    Attributes:
        served: samples of the global batch that came from the cache in the present step.
    """

    def __init__(self, loop: Loop, lowest: int, store: MemoryStore, limit: int) -> None:
        assert loop.lengths is not None, "streams are refused"
        self._prefix = Prefix(loop.engine.module, lowest)
        self._store, self._limit, self._world = store, limit, loop.world
        self._objective, self._module, self._device = loop.objective, loop.engine.module, loop.device
        self._lengths = loop.lengths
        # At stage 3 a pass gathers weights: no rank may skip layers alone.
        self._together = loop.engine.settings.zero_stage == 3
        self._owner = np.full(len(loop.lengths), _NOBODY, dtype=np.int32)
        self._used, self._unwritten = ([0] * self._world.size for _ in range(2))
        self._width, self._dtype = 0, torch.float32  # of the states; known from the first micro-batch
        self.served = 0
        self._reader: ReadAhead | None = None
        self._arriving: list[tuple[Sequence[int], HostRead]] = []  # states of samples that are kept, behind each other

    def losses(self, shares: StepIndices, following: StepIndices) -> LossOf:
        """The function of one step that takes the place of `Objective.loss`; each call is a collective.

        Args:
            shares: of every rank, the samples of each micro-batch in the order of the calls.
            following: those of the next step; empty if none is certain.
        """
        self.served = 0
        turns = [*zip(*shares, strict=True), *zip(*following, strict=True)]
        pairs = iter(zip_longest(turns, turns[1:]))
        return lambda forward, batch: self._loss(forward, batch, *next(pairs))

    def flush(self) -> None:
        """Collective. Write what is only in memory, if the states lie on disk."""
        self._store_arrived()
        if self._reader is not None:
            self._reader.settle()
        run_on_every_rank(self._store.flush)
        self._unwritten = [0] * self._world.size

    def close(self) -> None:
        """End the thread that reads ahead; a later step begins another one."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _loss(self, forward: Forward, batch: Batch, turn: Turn, following: Turn | None) -> torch.Tensor:
        """Collective. The loss of this rank's micro-batch.

        Args:
            following: every rank's next micro-batch, whose states are read meanwhile.
        """
        self._store_arrived()
        if not self._width:
            loss = self._first(forward, batch, turn)
            self._read_ahead(following)
            return loss
        ready = self._ready(turn)
        self.served += sum(len(samples) for samples, cached in zip(turn, ready, strict=True) if cached)
        own, states = turn[self._world.rank], self._collect(turn, ready)
        self._read_ahead(following)
        kept = self._assign(turn, ready)
        if states is not None:
            with self._prefix.starting(self._padded(batch, states, own)):
                loss = self._objective.loss(forward, batch)
        elif kept:
            with self._prefix.recording() as recorded:
                loss = self._objective.loss(forward, batch)
            self._keep(kept, dict(zip(own, self._places(recorded.states, own), strict=True)))
        else:
            loss = self._objective.loss(forward, batch)
        self._write_if_due()
        return loss

    def _ready(self, turn: Turn) -> list[bool]:
        """Of every rank, whether the states of its micro-batch are known."""
        ready = [bool((self._owner[list(samples)] != _NOBODY).all()) for samples in turn]
        return [all(ready)] * len(ready) if self._together else ready

    def _first(self, forward: Forward, batch: Batch, turn: Turn) -> torch.Tensor:
        """Collective. As `_loss`, with states that have just been computed.

        Raises:
            ConfigError: on every rank, if on any of them the loss is not that of the whole pass.
        """
        own = turn[self._world.rank]
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), self._prefix.recording() as recorded:
            expected = self._objective.loss(self._module, batch)
        states = dict(zip(own, self._places(recorded.states, own), strict=True))
        self._begin(recorded.states)
        with self._prefix.starting(self._padded(batch, states, own)):
            loss = self._objective.loss(forward, batch)
        difference = ((loss.detach() - expected).abs() / expected.abs().clamp(min=1.0)).nan_to_num(0.0)
        dist.all_reduce(difference, dist.ReduceOp.MAX)
        if float(difference) > _TOLERANCE[self._dtype]:
            kind = base_of(self._module).config.model_type  # type: ignore[union-attr]
            raise ConfigError(
                "training.prefix_cache",
                f"the loss changes by {float(difference):.1e} of itself if a pass begins at layer "
                f"{self._prefix.lowest}: the upper layers of a {kind} model take more from the lower ones",
                "expected off",
            )
        self._keep(self._assign(turn, [False] * len(turn)), states)
        self._write_if_due()
        return loss

    def _begin(self, states: torch.Tensor) -> None:
        """Collective. Take over the states that an earlier process has kept, and agree on who has which."""
        self._width, self._dtype = states.shape[-1], states.dtype
        rank, size = self._world.rank, self._world.size
        own = torch.zeros(len(self._lengths), dtype=torch.uint8)
        own[self._store.read(self._lengths.tolist(), self._width, self._dtype, (rank, size))] = 1
        own = own.to(states.device)
        found = [torch.zeros_like(own) for _ in range(size)]
        dist.all_gather(found, own)
        for holder, samples in enumerate(found):
            for sample in samples.nonzero().flatten().tolist():
                if self._owner[sample] == _NOBODY:
                    self._owner[sample] = holder
                    self._used[holder] += self._bytes(sample)

    def _assign(self, turn: Turn, ready: Sequence[bool]) -> list[int]:
        """Record who keeps the states that this micro-batch computes. Returns this rank's part, as samples."""
        kept = []
        for rank, samples in enumerate(turn):
            for sample in () if ready[rank] else samples:
                size = self._bytes(sample)
                if self._owner[sample] == _NOBODY and self._used[rank] + size <= self._limit:
                    self._owner[sample] = rank
                    self._used[rank] += size
                    self._unwritten[rank] += size
                    kept += [sample] if rank == self._world.rank else []
        return kept

    def _keep(self, kept: Sequence[int], states: dict[int, torch.Tensor]) -> None:
        """Begin to copy states to the host, which does not wait for the GPU in the middle of a step."""
        if kept:
            self._arriving.append((kept, HostRead(torch.cat([states[sample] for sample in kept]))))

    def _store_arrived(self) -> None:
        """Store them, before anybody asks for one."""
        for kept, states in self._arriving:
            self._store.put(dict(zip(kept, self._split(states.values(), kept), strict=True)))
        self._arriving = []

    def _write_if_due(self) -> None:
        """Collective if any rank has collected enough for a file, which all of them know."""
        if self._store.shard_bytes is not None and max(self._unwritten) >= self._store.shard_bytes:
            self.flush()

    def _collect(self, turn: Turn, ready: Sequence[bool]) -> dict[int, torch.Tensor] | None:
        """Collective if one rank needs another's states. This rank's by sample, on its device; None: it lacks some."""
        rank, size = self._world.rank, self._world.size
        moves = self._moves(turn, ready)
        states: dict[int, torch.Tensor] = {}
        if moves:
            taken = [sample for i in range(size) for origin, to, sample in moves if (origin, to) == (i, rank)]
            out = [sum(self._bytes(s) for origin, t, s in moves if (origin, t) == (rank, to)) for to in range(size)]
            into = [sum(self._bytes(s) for o, to, s in moves if (o, to) == (origin, rank)) for origin in range(size)]
            received = torch.empty(sum(into), dtype=torch.uint8, device=self._device)
            sent = self._on_device(self._sent(moves))
            dist.all_to_all_single(received, sent.view(torch.uint8).flatten(), into, out)
            rows = received.view(self._dtype).view(-1, self._width)
            states = dict(zip(taken, self._split(rows, taken), strict=True))
        if not ready[rank]:
            return None
        local = self._local(turn)
        return states | dict(zip(local, self._split(self._on_device(local), local), strict=True))

    def _moves(self, turn: Turn, ready: Sequence[bool]) -> list[tuple[int, int, int]]:
        """What one rank sends another, as (from, to, sample), in the same order on all."""
        return [
            (int(self._owner[sample]), to, sample)
            for to, samples in enumerate(turn)
            if ready[to]
            for sample in samples
            if self._owner[sample] != to
        ]

    def _sent(self, moves: Sequence[tuple[int, int, int]]) -> list[int]:
        return [sample for origin, _, sample in moves if origin == self._world.rank]

    def _local(self, turn: Turn) -> list[int]:
        return [sample for sample in turn[self._world.rank] if self._owner[sample] == self._world.rank]

    def _read_ahead(self, turn: Turn | None) -> None:
        """Begin to read the states of a later micro-batch that are known now."""
        if turn is None:
            return
        self._store_arrived()
        ready = self._ready(turn)
        local = self._local(turn) if ready[self._world.rank] else []
        self._states.begin(self._sent(self._moves(turn, ready)), local)

    @property
    def _states(self) -> ReadAhead:
        if self._reader is None:
            self._reader = ReadAhead(self._read, self._device)
        return self._reader

    def _read(self, samples: Sequence[int]) -> torch.Tensor:
        """(tokens, d): stored states one behind the other, in memory from which a GPU can copy while others compute."""
        tokens = sum(int(self._lengths[sample]) for sample in samples)
        flat = torch.empty((tokens, self._width), dtype=self._dtype, pin_memory=self._device.type == "cuda")
        for part, sample in zip(self._split(flat, samples), samples, strict=True):
            part.copy_(self._store[sample])
        return flat

    def _on_device(self, samples: Sequence[int]) -> torch.Tensor:
        """(tokens, d): their stored states."""
        return self._states.take(samples).to(self._device, non_blocking=True)

    def _split(self, flat: torch.Tensor, samples: Sequence[int]) -> Sequence[torch.Tensor]:
        return flat.split([int(self._lengths[sample]) for sample in samples])

    def _bytes(self, sample: int) -> int:
        return int(self._lengths[sample]) * self._width * self._dtype.itemsize

    def _padded(self, batch: Batch, states: dict[int, torch.Tensor], samples: Sequence[int]) -> torch.Tensor:
        """(B, L, d): the samples' states in their places, and zeros at padding."""
        padded = torch.zeros((*batch["input_ids"].shape, self._width), dtype=self._dtype, device=self._device)
        for place, sample in zip(self._places(padded, samples), samples, strict=True):
            place.copy_(states[sample])
        return padded

    def _places(self, states: torch.Tensor, samples: Sequence[int]) -> list[torch.Tensor]:
        """Views (tokens, d) into (B, L, d), one for each sample: a row each, padded on the right, or all in one row."""
        lengths = [int(self._lengths[sample]) for sample in samples]
        if len(states) == len(samples):
            return [row[:length] for row, length in zip(states, lengths, strict=True)]
        return list(states[0].split(lengths))


def open_prefix(
    loop: Loop, settings: TrainingConfig, log: Callable[[str], object], folder: Callable[[int], Path] | None = None
) -> PrefixCache | None:
    """Collective. The cache of a phase's loop as ``training.prefix_cache`` says; None where it is off or would not pay.

    Args:
        folder: collective; where states lie on disk that enter the layer of the given number.
    """
    mode, name = settings.prefix_cache, loop.phase.name
    if mode == "off":
        return None
    lowest = lowest_trained(loop.engine.module, loop.phase.plan)
    if not lowest:
        why = "layer 0 has an adapter" if lowest == 0 else "no layer has an adapter"
        log(f"training.prefix_cache does nothing in phase {name}: {why}")
        return None
    store, stored = MemoryStore(), False
    if mode == "disk":
        assert folder is not None
        store = DiskStore(folder(lowest), loop.world.rank, log)
        stored = bool(broadcast_int(int(any(store.folder.glob("rank-*")))))
    assert loop.lengths is not None
    if not stored and _samples_left(loop) <= len(loop.lengths):
        log(f"training.prefix_cache does not pay in phase {name}: at most one epoch is left of it")
        return None
    log(_describe(loop, lowest, settings.prefix_cache_bytes))
    return PrefixCache(loop, lowest, store, settings.prefix_cache_bytes)


def _samples_left(loop: Loop) -> int:
    """How many samples the phase has still to go through."""
    progress, phase = loop.progress, loop.phase
    steps = loop.schedule.last_step(progress, phase.global_batch_size) - progress.step
    if phase.steps is not None:
        steps = min(steps, phase.steps - progress.phase_updates)
    return steps * phase.global_batch_size


def _describe(loop: Loop, lowest: int, limit: int) -> str:
    """A log line: which layers are left out, and how many of the states fit."""
    assert loop.lengths is not None
    base: Any = base_of(loop.engine.module)
    row = base.config.get_text_config().hidden_size * DTYPES[loop.engine.settings.dtype].itemsize
    needed, processes = int(loop.lengths.sum()) * row, loop.world.size
    line = f"prefix cache: layers 0 to {lowest - 1} run once for a sample; their states take {needed / 2**20:,.1f} MiB"
    line += f" on {processes} processes" if processes > 1 else ""
    if needed > limit * processes:
        share = 100 * limit * processes / needed
        line += f", and training.prefix_cache_bytes holds {share:.0f} %; batches with other samples run all layers"
    return line
