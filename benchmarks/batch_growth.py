"""The freed memory as a larger micro-batch: tokens/s and peak live bytes of WeightLoRA's steps before and after T.

    python benchmarks/batch_growth.py --model FOLDER [--micro 2] [--total 16] [--length 256] [--steps 5]

FOLDER holds a Llama, such as SmolLM2-135M. All linear layers have adapters before T, and those in the top tenth of the
layers after it; the micro-batch after T is the one that a run with `batch_growth: keep_global` takes. Half of the
positions are supervised, in float32, at ZeRO-0. Each row is measured in a process of its own, after one step that
warms up: the median time of steps of the engine and the loop, and what torch's allocator holds at a step's peak beyond
what it held before. The planned bytes beside it have every position supervised.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from harness import argument_parser, print_table, start

ROWS = ("before T", "after T, same micro-batch", "after T, grown")


def measure(options: argparse.Namespace, row: str) -> dict[str, float]:
    """One row: micro-batch, tokens/s, planned and real bytes at a step's peak."""
    world = start()
    import torch
    from compare_cases import ALPHA, RANK, top_tenth
    from toolkit_step import loop_step
    from watching import Meter, step_memory

    from sparse_llm_ft.adapters import find_targets
    from sparse_llm_ft.config import RunConfig
    from sparse_llm_ft.data.samples import Sample
    from sparse_llm_ft.data.tasks.mode import CAUSAL_LM
    from sparse_llm_ft.engine.build import build_model, engine_settings
    from sparse_llm_ft.engine.engine import init_distributed
    from sparse_llm_ft.engine.memory import step_bytes
    from sparse_llm_ft.io.console import Console
    from sparse_llm_ft.model.loading import empty_model
    from sparse_llm_ft.phase import Phase
    from sparse_llm_ft.plan import uniform_plan, with_omega
    from sparse_llm_ft.planning.batch_size import grown_batch

    sizes = {"micro_batch_size": options.micro, "global_batch_size": options.total}
    config = RunConfig.model_validate(
        {
            "model": {"name": str(options.model), "dtype": "float32"},
            "task": {"name": "custom"},
            "method": {"name": "lora"},
            "training": {**sizes, "max_steps": 10**6, "schedule": "constant"},
            "deepspeed": {"zero_stage": 0},
            "output_dir": "unused",
        }
    )
    empty = empty_model(config.model)
    targets = find_targets(empty, "all-linear")
    everywhere = uniform_plan(targets, RANK, ALPHA)
    before = Phase("select", with_omega(everywhere), omega_lr=0.01).with_batch(options.micro, options.total)
    after = Phase("train", top_tenth(everywhere, targets), batch_growth="keep_global" if row == ROWS[2] else "none")
    shapes = {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}
    grown, _ = grown_batch(after, before, config, targets, options.length, 1, CAUSAL_LM, shapes)
    phase = before if row == ROWS[0] else grown

    init_distributed()
    settings = engine_settings(config, phase, world.size)
    model = build_model(config, CAUSAL_LM, phase.plan, settings.to_deepspeed(), world, Console(world.rank))
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, empty.config.vocab_size, (options.total, options.length), generator=draw).tolist()
    half = options.length // 2
    samples = [Sample(tuple(line[:half]), tuple(line[half:])) for line in tokens]
    running = replace(phase, batch_growth="none")
    system = loop_step(model, running, samples, settings, config.training, world, Meter())
    system.step()
    seconds = []
    for _ in range(options.steps):
        began = time.perf_counter()
        system.step()
        seconds.append(time.perf_counter() - began)
    planned = step_bytes(config.model, phase.plan, options.length, CAUSAL_LM, phase.micro_batch_size)
    return {
        "micro": phase.micro_batch_size,
        "tokens": options.total * options.length / median(seconds),
        "planned": planned.peak / 2**20,
        "peak": step_memory(system.step).peak / 2**20,
    }


def main() -> None:
    """Measure the rows one after the other, and print them."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    for name, value in (("micro", 2), ("total", 16), ("length", 256), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options, options.row)))
        return
    found = {}
    for row in ROWS:
        again = [sys.executable, *sys.argv, "--row", row]
        found[row] = json.loads(subprocess.run(again, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    first = found[ROWS[0]]["tokens"]
    print_table(
        ["", "micro-batch", "tokens/s", "of before T", "planned peak, MiB", "peak, MiB"],
        [
            [row, f"{r['micro']:.0f}", f"{r['tokens']:,.0f}", f"{r['tokens'] / first:.2f}"]
            + [f"{r[key]:,.0f}" for key in ("planned", "peak")]
            for row, r in found.items()
        ],
    )


if __name__ == "__main__":
    main()
