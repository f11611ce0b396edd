"""Which weights a rank has gathered at what time of a step at ZeRO-3, by the rules of DeepSpeed 0.19.8.

`PartitionedParameterCoordinator` knows the order of uses from the first steps. Before a module's pass it gathers what
the module reads, and then begins to gather what comes next, up to ``prefetch_bucket_size`` values. Behind a pass it
releases what no module reads again within ``max_reuse_distance`` values. Several parameters come in one buffer, from
which each is copied when the first of them is needed; the buffer lives until the last one is. Frozen embeddings and
heads are gathered without it, for one use each (engine/tables.py). Frozen weights that are gathered to compute a
checkpointed layer again stay until its backward pass is over (`zero.keep_recomputed`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sparse_llm_ft.engine.rank_bytes import Weight, persists
from sparse_llm_ft.engine.step_trace import StepTrace


@dataclass(frozen=True)
class Gathers:
    """A step's gathers.

    Attributes:
        most: bytes of gathered weights, at the most.
        kept: bytes between the passes.
        traffic: bytes that are gathered in a step, every rank's part counted.
        during: bytes at the most while a module's weights are being fetched, for every use of the trace.
        after: bytes from then on to the next use.
    """

    most: int
    kept: int
    traffic: int
    during: tuple[int, ...]
    after: tuple[int, ...]


@dataclass
class _Buffer:
    """What one collective gathers."""

    waiting: set[str]
    names: tuple[str, ...]
    bytes: int
    copied: bool = False


@dataclass
class _Coordinator:
    weights: Mapping[str, Weight]
    config: Any
    ranks: int
    order: Sequence[tuple[str, ...]]
    available: dict[str, int] = field(default_factory=dict)  # name -> bytes of its storage
    flight: dict[str, _Buffer] = field(default_factory=dict)
    fetched_for: dict[str, int] = field(default_factory=dict)
    kept: dict[str, set[str]] = field(default_factory=dict)  # checkpointed layer -> weights
    now: int = 0
    most: int = 0
    traffic: int = 0
    live: int = 0  # values

    def __post_init__(self) -> None:
        self.queue = deque((name, i) for i, names in enumerate(self.order) for name in names)
        self.step = 0

    def _grow(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)

    def _bytes(self, name: str) -> int:
        weight = self.weights[name]
        return weight.part(self.ranks) * self.ranks * weight.itemsize

    def _gather(self, names: Sequence[str]) -> None:
        if not names:
            return
        size = sum(map(self._bytes, names))
        self.live += sum(self.weights[name].numel for name in names)
        self.traffic += size
        # A single parameter is gathered into its own place. Several have a buffer for each type, all of which wait
        # together, and are kept together.
        buffer = _Buffer(set(names), tuple(names), size, copied=len(names) == 1)
        self.flight |= dict.fromkeys(names, buffer)
        self._grow(size)

    def use_table(self, names: Sequence[str], begins: bool) -> None:
        """A frozen embedding or head is about to be used, or has been."""
        size = sum(map(self._bytes, names))
        if begins:
            self.traffic += size
            self._grow(size)
        else:
            self.now -= size

    def fetch(self, names: Sequence[str]) -> None:
        """A module is about to read these."""
        held = [n for n in names if not persists(self.weights[n], self.config)]
        self._gather([n for n in held if n not in self.available and n not in self.flight])
        for name in held:
            buffer = self.flight.pop(name, None)
            if buffer is None:
                continue
            if not buffer.copied:
                self._grow(sum(self.weights[n].numel * self.weights[n].itemsize for n in buffer.names))
                buffer.copied = True
            buffer.waiting.discard(name)
            if not buffer.waiting and len(buffer.names) > 1:
                self.now -= buffer.bytes
            weight = self.weights[name]
            self.available[name] = buffer.bytes if len(buffer.names) == 1 else weight.numel * weight.itemsize
        self._prefetch(names)
        self.step += 1

    def _prefetch(self, names: Sequence[str]) -> None:
        fresh = {n for n in names if self.fetched_for.get(n, -1) < self.step}
        done: set[str] = set()
        while self.queue and len(done) < len(fresh):
            name, at = self.queue.popleft()
            self.fetched_for[name] = at
            done.add(name)
        room = min(self.config.max_live_parameters - self.live, self.config.prefetch_bucket_size)
        wanted: list[str] = []
        count = 0
        while self.queue and count < room:
            name, at = self.queue.popleft()
            self.fetched_for[name] = max(self.fetched_for.get(name, -1), at)
            absent = name not in self.available and name not in self.flight and name not in wanted
            if absent and not persists(self.weights[name], self.config):
                wanted.append(name)
                count += self.weights[name].numel
        self._gather(wanted)

    def release(self, names: Sequence[str]) -> None:
        """A module's pass is over."""
        leaving = {n for n in names if n in self.available and self.fetched_for.get(n, -1) <= self.step}
        leaving -= {n for n in names if persists(self.weights[n], self.config)}
        leaving -= set().union(*self.kept.values())
        seen = 0
        for later in self.order[self.step :]:
            if seen >= self.config.max_reuse_distance or not leaving:
                break
            leaving -= set(later)
            seen += sum(self.weights[n].numel for n in later)
        self._let_go(leaving)

    def _let_go(self, names: Iterable[str]) -> None:
        for name in names:
            self.live -= self.weights[name].numel
            self.now -= self.available.pop(name)

    def keep(self, names: Sequence[str], layer: str) -> None:
        """These are read to compute a layer again."""
        own = self.kept.setdefault(layer, set())
        own |= {n for n in names if not (self.weights[n].trained or persists(self.weights[n], self.config))}

    def end(self, layer: str) -> None:
        """A layer's backward pass is over."""
        self._let_go(self.kept.pop(layer, set()) & self.available.keys())


def simulate(
    trace: StepTrace,
    weights: Mapping[str, Weight],
    config: Any,
    ranks: int,
    tables: Mapping[str, bool] | None = None,
) -> Gathers:
    """A step's gathers on one of `ranks` processes.

    Args:
        weights: by the names in `trace`; the scales of a 4-bit weight have its name with ``_absmax``.
        config: DeepSpeed's settings of ZeRO.
        tables: weights of frozen embeddings and heads -> whether the backward pass gathers them too.
    """
    tables = {name: again for name, again in (tables or {}).items() if not persists(weights[name], config)}
    nothing = (0,) * len(trace.uses)
    if ranks == 1:
        return Gathers(0, 0, 0, nothing, nothing)
    uses = [replace(use, parameters=_with_scales(use.parameters, weights)) for use in trace.uses]
    order = [use.parameters for use in uses if use.kind == "fetch" and not tables.keys() & set(use.parameters)]
    state, during, after, kept = _Coordinator(weights, config, ranks, order), list[int](), list[int](), 0
    for use in uses:
        if not use.backward:
            kept = state.now
        before, state.most = state.most, state.now
        if own := [name for name in use.parameters if name in tables]:
            state.use_table([name for name in own if tables[name] or not use.backward], use.kind == "fetch")
        elif use.kind == "fetch":
            state.fetch(use.parameters)
            if use.again:
                state.keep(use.parameters, use.again)
        else:
            state.release(use.parameters)
            if use.ends:
                state.end(use.ends)
        during.append(state.most)
        after.append(state.now)
        state.most = max(before, state.most)
    return Gathers(state.most, kept, state.traffic, tuple(during), tuple(after))


def _with_scales(names: Sequence[str], weights: Mapping[str, Weight]) -> tuple[str, ...]:
    return tuple(n for name in names for n in (name, f"{name}_absmax") if n in weights)
