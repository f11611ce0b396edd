"""Where a training step spends its time: part of the step × kind of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from compare_job import ADAPTERS, ATTENTION, ELEMENTWISE, HEAD, KINDS, PRODUCTS, PYTHON
from torch.autograd.profiler_util import FunctionEvent
from watching import PART, Meter

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "bitsandbytes::")


def profile(step: Callable[[], Any], count: int, rank: int, vocabulary: int) -> dict[str, dict[str, float]]:
    """Milliseconds of one step by part (`Meter.part`; ``loop`` is what lies outside) and by kind: medians of `count`.

    An operator belongs to the head if one of its inputs, or of those of the operator that called it, has a side as
    large as the vocabulary; to the adapters if one of the last two sides is the rank (batch × heads comes first). What
    autograd and Python do between operators is `PYTHON`. The profiler slows a step down, small operators most.
    """
    once = [_profile_once(step, rank, vocabulary) for _ in range(count)]
    return {part: {kind: median(each[part][kind] for each in once) for kind in KINDS} for part in once[0]}


def _profile_once(step: Callable[[], Any], rank: int, vocabulary: int) -> dict[str, dict[str, float]]:
    """Of one step: the events of several would take gigabytes."""
    meter = Meter()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as found, meter.part("loop"):
        step()
    times: dict[str, dict[str, float]] = {}
    for event in found.events():
        part = _part(event)
        if part is not None:
            kinds = times.setdefault(part, dict.fromkeys(KINDS, 0.0))
            kinds[_kind(event, rank, vocabulary)] += event.self_cpu_time_total / 1000
    return times


def _part(event: FunctionEvent | None) -> str | None:
    """The innermost part around the event."""
    while event is not None and not event.name.startswith(PART):
        event = event.cpu_parent
    return None if event is None else event.name.removeprefix(PART)


def _kind(event: FunctionEvent, rank: int, vocabulary: int) -> str:
    if not event.name.startswith(("aten::", "bitsandbytes::")):
        return PYTHON
    around: FunctionEvent | None = event
    names: list[str] = []
    sides: set[int] = set()
    while around is not None and around.name.startswith(("aten::", "bitsandbytes::")):
        names.append(around.name)
        for shape in _shapes(around.input_shapes or []):
            sides |= set(shape[-2:])
        around = around.cpu_parent
    if vocabulary in sides:
        return HEAD
    if rank in sides:
        return ADAPTERS
    if any("attention" in name for name in names):
        return ATTENTION
    return PRODUCTS if any(name.startswith(_PRODUCTS) for name in names) else ELEMENTWISE


def _shapes(inputs: Any) -> Iterator[Sequence[int]]:
    """The shapes among an operator's inputs, of tensors in lists as well."""
    if not isinstance(inputs, list | tuple):
        return
    if inputs and all(isinstance(side, int) for side in inputs):
        yield inputs
    for each in inputs:
        yield from _shapes(each)
