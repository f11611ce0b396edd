"""Greedy generation over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sparse_llm_ft.data.encoding import Sample, prompt_batch
from sparse_llm_ft.evaluation.loss import rank_batches
from sparse_llm_ft.signals import leave_if_asked


@torch.no_grad()
def generate(
    model: Any,
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    batch_size: int,
    rank: int,
    world_size: int,
    synced: bool,
) -> list[str]:
    """The greedy continuation of every sample's prompt, in order, on every rank. Collective.

    Args:
        synced: ZeRO-3, where ranks must make equally many forward passes.
    """
    device = next(model.parameters()).device
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    # Filled by the rank that generated a row and summed over ranks; text never has to be sent.
    tokens = torch.zeros((len(samples), max_new_tokens), dtype=torch.long, device=device)
    was_training = model.training
    model.eval()
    # In order of length, so that a batch holds little padding.
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].prompt))
    for places in rank_batches(len(samples), batch_size, rank, world_size):
        indices = [order[place] for place in places]
        batch = prompt_batch([samples[i] for i in indices] or samples[:1], tokenizer.pad_token_id)
        output = model.generate(
            **{k: v.to(device) for k, v in batch.items()}, generation_config=settings, synced_gpus=synced
        )
        new = output[:, batch["input_ids"].shape[1] :]
        for row, i in zip(new, indices, strict=False):
            tokens[i, : len(row)] = row + 1  # 0 marks what was not written
        leave_if_asked()
    model.train(was_training)
    dist.all_reduce(tokens)
    rows = [row[row > 0] - 1 for row in tokens.cpu()]
    return [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in rows]
