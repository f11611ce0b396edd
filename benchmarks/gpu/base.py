"""What a step of a Llama must compute, how long it takes, and where the device's time goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bf16, by the manufacturer's data sheets; a card's name contains the key."""


def step_flops(config: LlamaConfig, tokens: int, length: int, supervised: float, lowest: int) -> float:
    """Floating-point operations that one step cannot do without.

    Forward through everything; backward to activations, not to the base's weights, down to layer `lowest`. The
    adapters' own products, under one hundredth of it, are left out. Attention is causal.

    Args:
        tokens: of the whole step.
        length: of a sample.
        supervised: share of the positions that have a loss.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    key_value = hidden * (config.num_key_value_heads or config.num_attention_heads) // config.num_attention_heads
    weights = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * inner  # of a layer
    forward = 2 * weights + 2 * length * hidden
    backward = 2 * weights + 4 * length * hidden
    head = 2 * hidden * config.vocab_size * supervised
    layers = config.num_hidden_layers
    return tokens * (layers * forward + (layers - lowest) * backward + 2 * head)


def peak_tflops(device: torch.device) -> float | None:
    """The card's dense bf16 rate, where it is one of those known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for card, rate in PEAK_TFLOPS.items() if card in name), None)


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
