"""What a step of a Llama must compute, how long it takes, and where the device's time goes."""

from __future__ import annotations

import cProfile
import pstats
import time
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from watching import PART

from sparse_llm_ft.model.flops import model_flops


def step_flops(
    config: LlamaConfig, tokens: int, length: int, supervised: float, lowest: int, cached: bool = False
) -> float:
    """Floating-point operations that one step cannot do without (sparse_llm_ft/model/flops.py).

    Args:
        tokens: of the whole step.
        length: of a sample.
        supervised: share of the positions that have a loss.
        lowest: the lowest layer that has an adapter.
        cached: whether the layers below it are not run.
    """
    with torch.device("meta"):
        sizes = model_flops(LlamaForCausalLM(config))
    assert sizes is not None, "a Llama's arithmetic is known"
    return sizes.step(tokens, tokens * length, tokens * supervised, lowest, cached=float(cached))


def times(step: Callable[[], Any], device: torch.device, warmup: int, count: int) -> tuple[list[float], float]:
    """Milliseconds of `count` steps, and the host's time for one of them.

    CUDA events between steps tell the device's time, and nobody waits for the device between two steps but who reads a
    value in a step. The host's time is then the mean until all steps are given to the device. On the CPU both are the
    clock's.
    """
    for _ in range(warmup):
        step()
    if device.type != "cuda":
        found = []
        for _ in range(count):
            began = time.perf_counter()
            step()
            found.append(1000 * (time.perf_counter() - began))
        return found, sum(found) / count
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    began = time.perf_counter()
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    host = 1000 * (time.perf_counter() - began) / count
    marks[-1].synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(marks)], host


def profile(step: Callable[[], Any], device: torch.device, rows: int = 40) -> tuple[float, list[dict[str, Any]]]:
    """Milliseconds of the device in one step, and the operations that take most: name, calls, milliseconds."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, attribute))
    # An operation's own kernels are in the list beside it, and so are the named parts of a step.
    events = [e for e in events if not e.key.startswith((PART, "Optimizer.step"))]
    kernels = [e for e in events if device.type != "cuda" or e.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(getattr(e, attribute) for e in kernels) / 1000
    named = [{"name": e.key[:100], "calls": e.count, "ms": round(getattr(e, attribute) / 1000, 3)} for e in events]
    return total, named[:rows]


def waits(step: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """Where the host waits for a CUDA device in one step: file:line of the operation that waits, and how often. Waiting
    for an event is not counted.
    """
    if device.type != "cuda":
        return {}
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in told if "synchronizing" in str(w.message))
    return dict(found.most_common())


def host_profile(step: Callable[[], Any], rows: int = 40) -> list[dict[str, Any]]:
    """The functions in which Python spends most of its own time in one step: name, calls, milliseconds, which are more
    than without a profile. Those of the backward pass run in autograd's thread where the device has one.
    """
    measured = cProfile.Profile()
    measured.runcall(step)
    stats: Any = pstats.Stats(measured)
    found = [
        {"name": f"{Path(file).name}:{line}({name})", "calls": calls, "ms": 1000 * own, "with_callees_ms": 1000 * total}
        for (file, line, name), (_, calls, own, total, _) in stats.stats.items()
    ]
    return sorted(found, key=lambda row: -row["ms"])[:rows]
