"""What the benchmarks share: options, a random Llama and its engine, resident memory, tables.

torch is imported inside functions: `start` sets the number of threads before.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

    from sparse_llm_ft.distributed.world import World
    from sparse_llm_ft.engine.settings import EngineSettings


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that prints the script's docstring as it is, and takes what the deepspeed launcher passes."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return found


def start() -> World:
    """This process's place among the launched ones, with its share of the CPU cores."""
    from sparse_llm_ft.distributed.world import find_world, prepare_cpu

    world = find_world()
    prepare_cpu(world)
    return world


def engine_settings(stage: int) -> EngineSettings:
    """bfloat16, two samples in a step, under ZeRO `stage`."""
    from sparse_llm_ft.engine.settings import EngineSettings

    return EngineSettings(stage, "bfloat16", 2, 1, 1.0, 0.01, 0.0, "sgd", {})


def random_llama(
    vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int | None = None
) -> LlamaForCausalLM:
    """A frozen Llama of random bfloat16 weights, the same each time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).bfloat16().requires_grad_(False)
    return model


def random_batch(vocabulary: int, length: int) -> dict[str, torch.Tensor]:
    """Two samples of `length` tokens that a causal LM learns whole: tensors of shape (2, length)."""
    import torch

    tokens = torch.randint(0, vocabulary, (2, length))
    return {"input_ids": tokens, "labels": tokens}


def memory(field: str) -> int:
    """Bytes of ``VmRSS`` (resident memory) or ``VmHWM`` (its peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def restart_peak() -> None:
    """Let ``VmHWM`` begin at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table."""
    for cells in (header, *rows):
        print(f"| {' | '.join(cells)} |")
        if cells is header:
            print("|" + "---|" * len(header))
