"""The same row and column masks in the optimizer and in compact layers: bytes, and time of a step.

    python benchmarks/masking_homes.py [--keep 0.1] [--steps 15]

One process, ZeRO-2, bfloat16; a random Llama of 8 layers of width 512, r = 16 on all linear layers. The two homes (and
LoRA without masks) take turns, three steps each, and what is reported are medians and their ratio to LoRA's.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llm_ft.adapters import add_adapters, count_parameters, count_stored_parameters, find_targets
from sparse_llm_ft.distributed.world import find_world, prepare_cpu
from sparse_llm_ft.engine.engine import Engine, EngineSettings, init_distributed
from sparse_llm_ft.plan import AdapterPlan, IndexMask, Shape, uniform_plan

SETTINGS = EngineSettings(2, "bfloat16", 2, 1, 1.0, 0.01, 0.0, "sgd", {})
LENGTH = 128


def base() -> LlamaForCausalLM:
    """Random, 8 layers, vocabulary of 2048."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8
    )
    return LlamaForCausalLM(config).bfloat16().requires_grad_(False)


def masked(plan: AdapterPlan, shapes: dict[str, Shape], keep: float) -> AdapterPlan:
    """Random rows and columns of every adapter."""
    rng, modules = random.Random(0), dict(plan.modules)
    for name, adapter in plan.active.items():
        rows, cols = (IndexMask(n, tuple(sorted(rng.sample(range(n), max(1, round(keep * n)))))) for n in shapes[name])
        modules[name] = replace(adapter, rows=rows, cols=cols)
    return replace(plan, modules=modules)


class Timed:
    """One engine and the seconds of its steps."""

    def __init__(self, plan: AdapterPlan) -> None:
        self.engine = Engine(add_adapters(base(), plan), SETTINGS, plan)
        self.seconds: list[float] = []
        self.saved = 0

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """Forward, backward, update; counts the bytes kept for backward, parameters left out."""
        kept: dict[int, int] = {}
        own = {p.untyped_storage()._cdata for p in self.engine.module.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        started = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.engine.forward(**batch).loss
        self.saved = sum(kept.values())
        self.engine.backward(loss)
        self.engine.step(1e-3)
        self.seconds.append(time.perf_counter() - started)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    prepare_cpu(find_world())
    init_distributed()
    shapes = find_targets(base(), "all-linear")
    plain = uniform_plan(shapes, 16, 32)
    compact = masked(plain, shapes, options.keep)
    plans = {"LoRA": plain, "optimizer": replace(compact, masking="optimizer"), "compact": compact}
    timed = {name: Timed(plan) for name, plan in plans.items()}
    tokens = torch.randint(0, 2048, (2, LENGTH))
    batch: dict[str, Any] = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    for _ in range(options.steps // 3):
        for home in timed.values():
            for _ in range(3):
                home.step(batch)
    print("| masks | stored | trained | optimizer bytes | kept for backward | step | of LoRA's |")
    print("|---|---|---|---|---|---|---|")
    first = median(timed["LoRA"].seconds[3:])
    for name, home in timed.items():
        plan, seconds = plans[name], median(home.seconds[3:])
        stored, trained = count_stored_parameters(plan, shapes), count_parameters(plan, shapes)
        print(
            f"| {name} | {stored:,} | {trained:,} | {home.engine.optimizer_bytes():,} | "
            f"{home.saved / 2**20:.1f} MiB | {seconds:.3f} s | {seconds / first:.2f} |"
        )


if __name__ == "__main__":
    main()
