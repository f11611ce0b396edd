"""Classification: which labels a model chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sparse_llm_ft.evaluation.loss import batches_on
from sparse_llm_ft.evaluation.objective import Objective
from sparse_llm_ft.signals import leave_if_asked


@torch.no_grad()
def choose_labels(
    model: nn.Module, samples: Sequence[Any], objective: Objective[Any], batch_size: int, rank: int, world_size: int
) -> tuple[float, list[float]]:
    """The mean loss per unit, as by `mean_loss`, and for every sample, in order, on every rank, the label chosen or,
    in a regression, the score.

    Collective. The model is in evaluation mode meanwhile.
    """
    device = next(model.parameters()).device
    # Filled by the rank that judged a sample and summed over ranks.
    losses = torch.zeros(len(samples), dtype=torch.float64, device=device)
    choices = torch.zeros(len(samples), dtype=torch.float64, device=device)
    units = torch.zeros((), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for indices, batch in batches_on(device, samples, objective, batch_size, rank, world_size):
        loss, choice = objective.judge(model, batch)
        losses[indices] = loss[: len(indices)].double()
        units += sum(objective.units(samples[i]) for i in indices)
        choices[indices] = choice[: len(indices)].double()
        leave_if_asked()
    model.train(was_training)
    if world_size > 1:
        dist.all_reduce(losses)
        dist.all_reduce(choices)
        dist.all_reduce(units)
    return float(losses.sum()) / float(units), choices.tolist()
