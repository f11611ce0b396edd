"""What is read off one training step: seconds of its parts, bytes kept for backward, bytes alive, bytes sent."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sparse_llm_ft.engine.live_bytes import LiveBytes

FORWARD, BACKWARD, UPDATE, DATA = "forward", "backward", "update", "data"
"""Parts of a step."""
PART = "part: "
"""Before the names of parts in the profiler's events."""


def nothing() -> None:
    """What is called where nobody watches."""


@dataclass
class Meter:
    """Told by a system which part of its step runs; a part may run several times in a step.

    Attributes:
        seconds: of the step so far, by part.
        around_forward: makes a context that is entered around the forward pass and the loss.
        after_backward: called at the end of the backward pass.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    around_forward: Callable[[], AbstractContextManager[object]] = nullcontext
    after_backward: Callable[[], object] = nothing

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The context of part `name`, which torch's profiler shows as well."""
        began = time.perf_counter()
        around = self.around_forward() if name == FORWARD else nullcontext()
        with torch.profiler.record_function(PART + name), around:
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        if name == BACKWARD:
            self.after_backward()


class _Saved:
    """A tensor that autograd keeps; it dies with the graph's node."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class KeptBytes:
    """Bytes that a forward pass keeps for its backward pass: every storage once, `model`'s own ones left out.

    Counts what a node of the graph saves and still holds when the context ends, so nothing that a function saved
    and freed within its forward pass. What a function puts on its context as a plain attribute is out of sight; see
    `StepMemory.after_forward` for that.

    Attributes:
        total: bytes; set when the context ends.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.total = model, 0
        self._saved: list[weakref.ref[_Saved]] = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """The context around the forward pass. The loss must be alive when it ends."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor):
            yield
        alive = [saved.tensor for reference in self._saved if (saved := reference()) is not None]
        own = own_storages(self.model)
        kept = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in alive if not _is_parameter(t)}
        self.total = sum(size for storage, size in kept.items() if storage not in own)
        self._saved = []

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor)
        self._saved.append(weakref.ref(saved))
        return saved


def own_storages(model: nn.Module) -> set[int]:
    """The storages of the model's parameters, of its buffers, and of the scales of 4-bit weights."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        tensors += tensors_of(getattr(parameter, "quant_state", None))
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def tensors_of(state: Any) -> list[torch.Tensor]:
    """The tensors of a 4-bit weight's quantisation state; none of None."""
    if state is None:
        return []
    parts = [state.absmax, state.code, state.offset]
    return [part for part in parts if isinstance(part, torch.Tensor)] + tensors_of(state.state2)


def _is_parameter(tensor: torch.Tensor) -> bool:
    """Whether it is a parameter or a view of one; at ZeRO-3 their storages come and go."""
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)


@dataclass(frozen=True)
class StepMemory:
    """Bytes that torch's CPU allocator holds beyond what it held before the step.

    It sees every allocation of torch, those inside operators included; not what oneDNN or BLAS allocate themselves.

    Attributes:
        after_forward: when the forward pass and the loss are done.
        peak: the most at any time of the step.
        after: when the step is done.
    """

    after_forward: int
    peak: int
    after: int


def step_memory(step: Callable[[], object]) -> StepMemory:
    """Run a step, of which one part is called ``forward``. A step must have run before, so that its state exists."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    ends = [e.start_ns() + e.duration_ns() for e in events if e.name() == PART + FORWARD]
    alive = peak = after_forward = 0
    for event in events:
        if event.name() == "[memory]" and event.device_type() == torch.profiler.DeviceType.CPU:
            alive += event.nbytes()
            peak = max(peak, alive)
            if event.start_ns() <= max(ends):
                after_forward = alive
    return StepMemory(after_forward, peak, alive)


class Communicated(TorchDispatchMode):
    """Counts what this rank hands to collectives: of each call the larger of what goes in and what comes out.

    An all-reduce of n bytes counts n; a ring moves 2 (ranks - 1) / ranks of that per rank.

    Attributes:
        bytes: by the collective's name.
        calls: by the collective's name.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: dict[str, int] = {}
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count the call and make it."""
        if func.namespace == "c10d":
            sizes = [_nbytes(argument) for argument in (*args, *(kwargs or {}).values())]
            name = func._opname.strip("_")
            self.bytes[name] = self.bytes.get(name, 0) + max(sizes)
            self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


class GatheredBytes(LiveBytes):
    """Bytes of what collectives gather, or one rank sends to the others, and of concatenations of it: the weights that
    ZeRO-3 has gathered.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make the call, and follow what it gathers."""
        made = func(*args, **(kwargs or {}))
        name = func._opname.strip("_")
        if func.namespace == "c10d" and name.startswith(("allgather", "broadcast")):
            for tensor in tree_iter(args[0]):
                self._follow(tensor.untyped_storage())
        elif name == "cat" and all(part.untyped_storage()._cdata in self._alive for part in args[0]):
            self._follow(made.untyped_storage())
        return made


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0
