"""Memory of a change of plan around a frozen base: resident memory before, its peak during the change, and after.

    deepspeed --num_gpus 2 benchmarks/phase_change.py [--stage 2] [--quantization nf4] [--rebuilds 20]

A random Llama of about 110 million parameters, all linear layers with LoRA, r = 16; then all but one adapter are
disconnected, and so on in turn. Printed by rank 0, in MiB above what was resident before the model was loaded. The peak
is the kernel's (VmHWM), set back before each measurement.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Literal, cast

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llm_ft.adapters import add_adapters, find_targets
from sparse_llm_ft.adapters.build import change_plan
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.distributed.world import find_world, prepare_cpu
from sparse_llm_ft.engine.engine import Engine, EngineSettings, init_distributed
from sparse_llm_ft.model.loading import load_model
from sparse_llm_ft.plan import AdapterPlan, uniform_plan

LENGTH = 256


def memory(field: str) -> float:
    """MiB of VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def restart_peak() -> None:
    """Let VmHWM begin at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def step(engine: Engine) -> None:
    """Two samples of 256 tokens."""
    tokens = torch.randint(0, 8192, (2, LENGTH))
    engine.backward(engine.forward(input_ids=tokens, labels=tokens, use_cache=False).loss)
    engine.step(1e-3)


def main() -> None:
    """Train, change, train, change, ..."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none")
    parser.add_argument("--rebuilds", type=int, default=20)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    world = find_world()
    prepare_cpu(world)
    settings = EngineSettings(options.stage, "bfloat16", 2, 1, 1.0, 0.01, 0.0, "sgd", {})
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=14, num_attention_heads=12
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)  # each rank; once they are a group, only the first
        init_distributed()
        start = memory("VmRSS")
        quantization = cast(Literal["none", "nf4"], options.quantization)
        base = load_model(ModelConfig(name=folder, dtype="bfloat16", quantization=quantization))
    plan = uniform_plan(find_targets(base, "all-linear"), 16, 32)
    first = next(iter(plan.modules))
    smaller = AdapterPlan({name: plan.modules[name] if name == first else None for name in plan.modules})
    model, before = add_adapters(base, plan), plan
    engine = Engine(model, settings)
    rows = []
    for i in range(options.rebuilds + 1):
        restart_peak()
        step(engine)
        training, optimizer_bytes = memory("VmHWM"), engine.optimizer_bytes()
        restart_peak()
        current = (smaller, plan)[i % 2]
        engine.close()
        model = change_plan(model, before, current)
        engine, before = Engine(model, settings), current
        rows.append((training - start, memory("VmHWM") - start, memory("VmRSS") - start, optimizer_bytes))
    if world.rank == 0:
        print(f"ZeRO-{options.stage}, {options.quantization}, {world.size} ranks")
        print("| change | peak of the step before | peak of the change | resident after | optimizer bytes before |")
        print("|---|---|---|---|---|")
        for i in sorted({0, 1, 2, 3, len(rows) - 2, len(rows) - 1}):
            training, change, after, size = rows[i]
            print(f"| {i + 1} | {training:.0f} | {change:.0f} | {after:.0f} | {size:,} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
