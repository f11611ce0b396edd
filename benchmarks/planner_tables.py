"""The tables of docs/planning.md: what Llama-2-7B and Llama-3-8B need on each GPU, by method, stage, type and length.

    python benchmarks/planner_tables.py [--models llama-2-7b llama-3-8b] [--lengths 1024 4096 8192]

Only the models' shapes are used. Every cell is the peak of a step of one sample on one GPU, in GiB, on 1 / 8 / 16 / 32
GPUs; one number if these are equal, and two with an arrow for a method whose last phase differs from its first. The
assumed CUDA context, NCCL and allocator are included. Layers are checkpointed, and the loss is taken at every position.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import argument_parser, print_table, start

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
}
"""From the models' own config.json."""

WORLDS = (1, 8, 16, 32)
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora"},
    "weight_lora": {"name": "weight_lora", "keep": 22, "steps": 100, "batch_growth": "none"},
    "weight_lora_plus": {"name": "weight_lora_plus", "keep": 22, "steps": 100, "batch_growth": "none"},
    "lora_drop": {"name": "lora_drop"},
    "partial_lora": {"name": "partial_lora", "ratios": "balanced", "ratio": 0.5},
}


def main() -> None:
    """Print a table for each model."""
    parser = argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 8192])
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 2, 3])
    options = parser.parse_args()
    start()
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            settings = SHAPES[model] | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
            (Path(folder) / "config.json").write_text(json.dumps(settings), encoding="utf-8")
            print(f"\n{model}:\n")
            table(folder, SHAPES[model]["max_position_embeddings"], options)


def table(folder: str, positions: int, options: argparse.Namespace) -> None:
    """One model's. A length beyond its positions is left out."""
    lengths = [length for length in options.lengths if length <= positions]
    rows = []
    for method in METHODS:
        for quantization in ("none", "nf4"):
            for stage in options.stages:
                cells = [cell(folder, method, quantization, stage, length) for length in lengths]
                print(method, quantization, stage, *cells, file=sys.stderr, flush=True)
                rows.append([method, "nf4" if quantization == "nf4" else "bf16", str(stage), *cells])
    print_table(["method", "base", "ZeRO", *(f"{length:,} tokens" for length in lengths)], rows)


def cell(folder: str, method: str, quantization: str, stage: int, length: int) -> str:
    """GiB on each number of GPUs."""
    peaks = [phase_peaks(folder, method, quantization, stage, length, ranks) for ranks in WORLDS]
    texts = [" → ".join(dict.fromkeys(f"{peak / 2**30:.1f}" for peak in (one[0], one[-1]))) for one in peaks]
    return " / ".join(texts if len(set(texts)) > 1 else texts[:1])


def phase_peaks(folder: str, method: str, quantization: str, stage: int, length: int, ranks: int) -> list[int]:
    """Each phase's peak of a step."""
    from sparse_llm_ft.config import parse_config
    from sparse_llm_ft.distributed.world import World
    from sparse_llm_ft.planning.forecast import forecast
    from sparse_llm_ft.planning.opening import open_for_planning
    from sparse_llm_ft.planning.samples import SampleSizes

    config = parse_config(
        {
            "model": {"name": folder, "quantization": quantization, "gradient_checkpointing": True},
            "task": {"name": "custom", "path": ".", "prompt": "{a}", "completion": "{b}", "max_length": length},
            "adapter": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
            "method": METHODS[method],
            "training": {"micro_batch_size": 1, "global_batch_size": 32, "max_steps": 1000},
            "evaluation": {"samples": 0},
            "deepspeed": {"zero_stage": stage},
            "output_dir": "unused",
        }
    )
    context = open_for_planning(config, World(0, ranks, 0, ranks))
    found = forecast(context, samples=replace(SampleSizes.assumed(length), equal=True))
    return [phase.peaks["step"] for phase in found.phases]


if __name__ == "__main__":
    main()
