"""Two-rank cases of engine/tables.py: no rank holds an embedding or a head longer than it uses it."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.case_tools import OBJECTIVE, PLAIN, RESULTS, SAMPLES, WORLD, case, engine_settings, plan_for, start_values
from sparse_llm_ft.adapters import add_adapters
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.engine import tables
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.engine.live_bytes import LiveBytes
from sparse_llm_ft.engine.sharded_loading import load_sharded_model
from sparse_llm_ft.objectives.language_modeling import CompletionObjective

VOCABULARY, WIDTH = 16384, 256
TABLE = VOCABULARY * WIDTH * 2
"""Bytes of the embedding, and of the head, in bfloat16: 8 MiB. All other weights together have 1.5 MiB."""


def wide_vocabulary(tied: bool) -> str:
    """A Llama with small layers and large tables."""
    folder = Path(RESULTS).with_name(f"wide-vocabulary-{tied}")
    if WORLD.rank == 0 and not folder.exists():
        torch.manual_seed(5)
        sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).bfloat16()
        model.save_pretrained(folder)
    dist.barrier()
    return str(folder)


def steps_of(base: nn.Module, objective: CompletionObjective) -> tuple[list[float], list[tuple[int, int, int]], int]:
    """Three steps' losses, their (bytes after the forward pass, its peak, backward's peak), and how many tables were
    gathered by `Tables`.
    """
    model = add_adapters(base, plan_for(base))
    start = start_values(model)
    engine = Engine(model, engine_settings(3, 2, "bfloat16"))
    engine.load(start)
    engine.module.train()
    losses, sizes = [], []
    with mock.patch.object(tables, "_whole", mock.Mock(wraps=tables._whole)) as gathers:
        for _ in range(3):
            with LiveBytes() as live:
                loss = objective.loss(engine.forward, objective.batch(SAMPLES[:2]))
                after, forward_peak, live.peak = live.now, live.peak, live.now
                engine.backward(loss)
                sizes.append((after, forward_peak, live.peak))
            engine.step(1e-2)
            losses.append(float(loss.detach()))
    engine.close()
    assert "forward" not in base.get_input_embeddings().__dict__
    model.unload()
    return losses, sizes, gathers.call_count


@case
def tables_are_gathered_for_one_use_each() -> None:
    """At any time one table is whole at most, and none after the forward pass; with the losses that DeepSpeed's own
    gathering gives, which holds at least two.
    """
    for tied, quantization, objective in ((False, "none", OBJECTIVE), (True, "nf4", OBJECTIVE), (False, "nf4", PLAIN)):
        config = ModelConfig(name=wide_vocabulary(tied), dtype="bfloat16", quantization=quantization)
        base = load_sharded_model(config, engine_settings(3, 2, "bfloat16").to_deepspeed())
        losses, sizes, gathers = steps_of(base, objective)
        with mock.patch.object(tables, "_tables_of", lambda model: []):
            expected, with_hooks, none = steps_of(base, objective)
        assert losses == expected and losses[0] != losses[-1], (losses, expected)
        # The embedding and the head, once each; the head of a model that returns logits in backward too.
        assert (gathers, none) == (3 * (2 if objective is OBJECTIVE else 3), 0), gathers
        for after, forward_peak, backward_peak in sizes:
            assert after < 0.5 * TABLE, (after / TABLE, sizes)
            assert TABLE <= forward_peak < 1.5 * TABLE, (forward_peak / TABLE, sizes)
            assert backward_peak < (0.5 if objective is OBJECTIVE else 1.5) * TABLE, (backward_peak / TABLE, sizes)
        assert max(peak for _, *peaks in with_hooks for peak in peaks) >= 2 * TABLE, with_hooks
