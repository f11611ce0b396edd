"""The same row and column masks in the optimizer and in compact layers: bytes, and time of a step.

    python benchmarks/masking_homes.py [--keep 0.1] [--steps 15]

One process, ZeRO-2, bfloat16; a random Llama of 8 layers of width 512, r = 16 on all linear layers. LoRA without masks
and the two places for masks take turns of three steps each. The table shows medians and their ratio to LoRA's.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from harness import argument_parser, engine_settings, print_table, random_batch, random_llama, start
from transformers import LlamaForCausalLM

from sparse_llm_ft.adapters import add_adapters, count_parameters, count_stored_parameters, find_targets
from sparse_llm_ft.engine.engine import Engine, process_group
from sparse_llm_ft.plan import AdapterPlan, IndexMask, Shape, uniform_plan

VOCABULARY, LENGTH = 2048, 128


def base() -> LlamaForCausalLM:
    """The frozen model of 8 layers."""
    return random_llama(VOCABULARY, hidden=512, intermediate=1408, layers=8, heads=8)


def masked(plan: AdapterPlan, shapes: dict[str, Shape], keep: float) -> AdapterPlan:
    """The plan with random masks on every adapter."""
    rng, modules = random.Random(0), dict(plan.modules)
    for name, adapter in plan.active.items():
        rows, cols = (IndexMask(n, tuple(sorted(rng.sample(range(n), max(1, round(keep * n)))))) for n in shapes[name])
        modules[name] = replace(adapter, rows=rows, cols=cols)
    return replace(plan, modules=modules)


class Timed:
    """One engine, the seconds of its steps, and the bytes that one keeps for backward."""

    def __init__(self, plan: AdapterPlan) -> None:
        self.engine = Engine(add_adapters(base(), plan), engine_settings(2), plan)
        self.seconds: list[float] = []
        self.saved = 0

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """Forward, backward, update. Counts the bytes kept for backward, without those of parameters."""
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
    parser = argument_parser(__doc__)
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    start()
    with process_group():
        measure(options.keep, options.steps)


def measure(keep: float, steps: int) -> None:
    """Print a row for LoRA and for each place of the masks. Collective."""
    shapes = find_targets(base(), "all-linear")
    plain = uniform_plan(shapes, 16, 32)
    compact = masked(plain, shapes, keep)
    plans = {"LoRA": plain, "optimizer": replace(compact, masking="optimizer"), "compact": compact}
    timed = {name: Timed(plan) for name, plan in plans.items()}
    batch: dict[str, Any] = {**random_batch(VOCABULARY, LENGTH), "use_cache": False}
    for _ in range(steps // 3):
        for engine in timed.values():
            for _ in range(3):
                engine.step(batch)
    first, rows = median(timed["LoRA"].seconds[3:]), []
    for name, engine in timed.items():
        plan, seconds = plans[name], median(engine.seconds[3:])
        stored, trained = count_stored_parameters(plan, shapes), count_parameters(plan, shapes)
        sizes = [f"{size:,}" for size in (stored, trained, engine.engine.optimizer_bytes())]
        rows.append([name, *sizes, f"{engine.saved / 2**20:.1f} MiB", f"{seconds:.3f} s", f"{seconds / first:.2f}"])
    print_table(["masks", "stored", "trained", "optimizer bytes", "kept for backward", "step", "of LoRA's"], rows)


if __name__ == "__main__":
    main()
