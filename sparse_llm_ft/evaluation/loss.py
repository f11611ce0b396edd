"""The completion-only loss, for training and for evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from sparse_llm_ft.data.encoding import IGNORED, Batch, Sample, training_batch


def completion_loss(forward: Callable[..., Any], batch: Batch, keeps_logits: bool) -> torch.Tensor:
    """Cross-entropy summed over the completion tokens of a batch, float32.

    Args:
        forward: the model, or an engine around it.
        batch: from `training_batch`, on the model's device.
        keeps_logits: whether the model takes ``logits_to_keep`` (`takes_logits_to_keep`); then it computes logits
            only at positions that some sample of the batch supervises.
    """
    labels = batch["labels"]
    # The logits at position t predict the token at t + 1.
    positions = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)  # Shape: (P,)
    options: dict[str, Any] = {"logits_to_keep": positions} if keeps_logits else {}
    output = forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **options)
    logits = output.logits if keeps_logits else output.logits[:, positions]  # Shape: (B, P, V)
    targets = labels[:, positions + 1]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the base model's forward has the parameter ``logits_to_keep``."""
    base: Any = model
    base = base.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def rank_batches(count: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Indices 0..count-1 dealt to ranks and cut into batches; every rank gets as many batches.

    Under ZeRO-3 a forward pass is a collective, so a rank without samples left must still take part: it gets an
    empty batch.
    """
    mine = list(range(rank, count, world_size))
    most = -(-count // world_size)
    return [mine[i : i + batch_size] for i in range(0, most, batch_size)]


@torch.no_grad()
def mean_loss(
    model: nn.Module, samples: Sequence[Sample], pad_token_id: int, batch_size: int, rank: int, world_size: int
) -> float:
    """Mean cross-entropy per completion token over all `samples`, each counted once whatever the world size.

    Collective. The model is in evaluation mode meanwhile.
    """
    device = next(model.parameters()).device
    keeps_logits = takes_logits_to_keep(model)
    total = torch.zeros(2, dtype=torch.float64)
    was_training = model.training
    model.eval()
    for indices in rank_batches(len(samples), batch_size, rank, world_size):
        chosen = [samples[i] for i in indices]
        batch = training_batch(chosen or samples[:1], pad_token_id)
        loss = completion_loss(model, {k: v.to(device) for k, v in batch.items()}, keeps_logits)
        if chosen:
            total += torch.tensor(
                [float(loss), float(sum(sample.supervised for sample in chosen))], dtype=torch.float64
            )
    model.train(was_training)
    total = total.to(device)
    dist.all_reduce(total)
    return float(total[0] / total[1])
