"""What a step of a Llama must compute, how long it takes, and where the device's time goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llm_ft.model.flops import model_flops


def step_flops(config: LlamaConfig, tokens: int, length: int, supervised: float, lowest: int) -> float:
    """Floating-point operations that one step cannot do without (sparse_llm_ft/model/flops.py).

    Args:
        tokens: of the whole step.
        length: of a sample.
        supervised: share of the positions that have a loss.
        lowest: the lowest layer that has an adapter.
    """
    with torch.device("meta"):
        sizes = model_flops(LlamaForCausalLM(config))
    assert sizes is not None, "a Llama's arithmetic is known"
    return sizes.step(tokens, tokens * length, tokens * supervised, lowest)


def times(step: Callable[[], Any], device: torch.device, warmup: int, count: int) -> list[float]:
    """Milliseconds of `count` steps: CUDA events, or on the CPU the clock."""
    for _ in range(warmup):
        step()
    found = []
    for _ in range(count):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            step()
            found.append(1000 * (time.perf_counter() - began))
    return found


def profile(step: Callable[[], Any], device: torch.device, rows: int = 25) -> list[dict[str, Any]]:
    """The operations of one step that take the most time of the device: name, calls, milliseconds."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        step()
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, attribute))[:rows]
    return [{"name": e.key[:100], "calls": e.count, "ms": round(getattr(e, attribute) / 1000, 3)} for e in events]
