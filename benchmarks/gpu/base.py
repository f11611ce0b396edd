"""A Llama of random weights, made on the device; what a step of it must compute; and where the device's time goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bf16, by the manufacturer's data sheets; a card's name contains the key."""

_KEPT_WHOLE = "lm_head"


def llama_config(tiny: bool) -> LlamaConfig:
    """Llama-3-8B, or one of four narrow layers."""
    if tiny:
        return LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        max_position_embeddings=8192,
    )


def random_base(config: LlamaConfig, quantization: str, device: torch.device) -> LlamaForCausalLM:
    """The frozen base in bfloat16, or with its layers' weights in nf4."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.requires_grad_(False)
    model.config.use_cache = False
    if quantization == "nf4":
        _quantize(model, device)
    return model


def _quantize(model: LlamaForCausalLM, device: torch.device) -> None:
    """Put 4-bit layers in place, as transformers does it while it loads a checkpoint."""
    import bitsandbytes as bnb

    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != _KEPT_WHOLE]
    for name, module in linear:
        layer = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=torch.bfloat16,
            device="meta",
        )
        layer.weight = bnb.nn.Params4bit(
            module.weight.data.cpu() if device.type == "cpu" else module.weight.data,
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=torch.bfloat16,
            module=layer,
        ).to(device)
        layer.support_avx512bf16_for_cpu = False
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # by which PEFT chooses its layers


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
