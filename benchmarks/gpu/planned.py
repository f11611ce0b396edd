"""The planner's peaks of the steps that speed.py makes with this toolkit. One JSON line: "BASE:SYSTEM" -> bytes.

    python benchmarks/gpu/planned.py [--tiny]

Needs no GPU: it traces a step on the meta device. The planner takes every position to have a loss; speed.py's samples
have one at half of them. Both are bytes of tensors, without what a driver and an allocator hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tests")]

from bases import llama_3_8b, tiny_llama
from compare_cases import top_tenth
from speed import ALPHA, RANK, sizes_of

from helpers.tiny_files import make_model
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan, with_omega
from sparse_llm_ft.planning.forecast import NO_DEVICE, forecast
from sparse_llm_ft.planning.phases import ForeseenPhase
from sparse_llm_ft.planning.samples import SampleSizes

Change = Callable[[AdapterPlan, Any], AdapterPlan]

PLANNED: dict[str, tuple[float, Change]] = {
    "lora": (0.0, lambda plan, _: plan),
    "lora, dropout .05": (0.05, lambda plan, _: plan),
    "weight_lora before its first cut": (0.0, lambda plan, _: with_omega(plan)),
    "weight_lora before T": (0.0, lambda plan, _: with_omega(plan)),
    "weight_lora after T, top tenth": (0.0, top_tenth),
}
"""System -> its dropout, and what makes its plan of the one in which every linear layer has an adapter."""


def planned_peak(model: Path, base: str, system: str, batch: int, length: int) -> int:
    """Bytes of one step's peak, weights and optimizer state included."""
    dropout, change = PLANNED[system]
    tree = {
        "model": {"name": str(model), "dtype": "bfloat16", "quantization": base},
        "task": {"name": "custom", "path": ".", "prompt": "{a}", "completion": "{b}", "max_length": length},
        "adapter": {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": dropout, "target_modules": "all-linear"},
        "method": {"name": "lora"},
        "training": {"micro_batch_size": batch, "global_batch_size": batch, "max_steps": 1000},
        "deepspeed": {"zero_stage": 2},
        "evaluation": {"samples": 0},
        "output_dir": "unused",
    }
    config = parse_config(tree)
    context = RunContext.open(config, World(0, 1, 0, 1), resolve_task(config.task))
    phase = Phase("speed", change(context.plan, context.targets)).with_batch(batch, batch)
    samples = SampleSizes(length, length, length**2, length / 2, 10**6, False, equal=True)
    found = forecast(context, 1, samples, overhead=NO_DEVICE, phases=(ForeseenPhase(phase, "", None),))
    return found.phases[0].peaks["step"]


def main() -> None:
    """Plan all systems on both bases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    shapes = tiny_llama() if options.tiny else llama_3_8b()
    batch, length = sizes_of(options.tiny)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        make_model(model)  # for its tokenizer
        (model / "model.safetensors").unlink()
        (model / "config.json").write_text(json.dumps(shapes.to_dict() | {"architectures": ["LlamaForCausalLM"]}))
        peaks = {
            f"{base}:{system}": planned_peak(model, base, system, batch, length)
            for base in ("none", "nf4")
            for system in PLANNED
        }
    sys.stdout.write(f"\n{json.dumps(peaks)}\n")


if __name__ == "__main__":
    main()
