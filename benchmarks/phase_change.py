"""Memory of a change of plan around a frozen base: resident memory before, its peak during the change, and after.

    deepspeed --num_gpus 2 benchmarks/phase_change.py [--stage 2] [--quantization nf4] [--rebuilds 20]

A random Llama of about 110 million parameters trains in turn with LoRA (r = 16) on all linear layers and on one. Rank 0
prints MiB above what was resident before the model was loaded. The peak is the kernel's (VmHWM), reset before each
measurement.
"""

from __future__ import annotations

import tempfile
from typing import Literal

from harness import (
    argument_parser,
    engine_settings,
    memory,
    print_table,
    random_batch,
    random_llama,
    restart_peak,
    start,
)

from sparse_llm_ft.adapters import add_adapters, find_targets
from sparse_llm_ft.adapters.build import change_plan
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.engine.engine import Engine, process_group
from sparse_llm_ft.model.loading import load_model
from sparse_llm_ft.plan import AdapterPlan, uniform_plan

VOCABULARY, LENGTH = 8192, 256


def main() -> None:
    """Write the base, load it, measure."""
    parser = argument_parser(__doc__)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none")
    parser.add_argument("--rebuilds", type=int, default=20)
    options = parser.parse_args()
    world = start()
    with tempfile.TemporaryDirectory() as folder:
        # Each rank writes a base of its own: in a process group only the first one would.
        random_llama(VOCABULARY, hidden=768, intermediate=2048, layers=14, heads=12).save_pretrained(folder)
        with process_group():
            rows = measure(folder, options.stage, options.quantization, options.rebuilds)
    if world.rank == 0:
        print(f"ZeRO-{options.stage}, {options.quantization}, {world.size} ranks")
        header = ["change", "peak of the step before", "peak of the change", "resident after", "optimizer bytes before"]
        shown = sorted({0, 1, 2, 3, len(rows) - 2, len(rows) - 1} & set(range(len(rows))))
        print_table(header, [[f"{i + 1}", *rows[i]] for i in shown])


def measure(folder: str, stage: int, quantization: Literal["none", "nf4"], rebuilds: int) -> list[list[str]]:
    """Train a step, change the plan, and so on: the cells of a row for each change. Collective."""
    settings, start_bytes = engine_settings(stage), memory("VmRSS")
    base = load_model(ModelConfig(name=folder, dtype="bfloat16", quantization=quantization))
    if quantization == "none":  # of a mapped file's pages the kernel takes some back whenever it likes
        for parameter in base.parameters():
            parameter.data = parameter.data.clone()
    plan = uniform_plan(find_targets(base, "all-linear"), 16, 32)
    first = next(iter(plan.modules))
    smaller = AdapterPlan({name: plan.modules[name] if name == first else None for name in plan.modules})
    model, before = add_adapters(base, plan), plan
    engine = Engine(model, settings)
    rows = []
    for i in range(rebuilds + 1):
        restart_peak()
        engine.backward(engine.forward(**random_batch(VOCABULARY, LENGTH), use_cache=False).loss)
        engine.step(1e-3)
        training, optimizer_bytes = memory("VmHWM"), engine.optimizer_bytes()
        restart_peak()
        current = (smaller, plan)[i % 2]
        engine.close()
        model = change_plan(model, before, current)
        engine, before = Engine(model, settings), current
        sizes = (training, memory("VmHWM"), memory("VmRSS"))
        rows.append([*(f"{(size - start_bytes) / 2**20:.0f}" for size in sizes), f"{optimizer_bytes:,}"])
    return rows


if __name__ == "__main__":
    main()
