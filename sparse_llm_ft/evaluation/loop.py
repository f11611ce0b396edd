"""Forward passes over samples that are dealt to all ranks: the mean loss, and the labels chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from sparse_llm_ft.data.collate import Batch
from sparse_llm_ft.distributed.signals import exit_if_preempted
from sparse_llm_ft.objectives.base import Objective, lengths_of

S = TypeVar("S")


def rank_batches(count: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Indices 0..count-1 dealt to ranks and cut into batches; every rank gets as many batches.

    Under ZeRO-3 a forward pass is a collective, so a rank without samples left must still take part: it gets an
    empty batch.
    """
    mine = list(range(rank, count, world_size))
    most = -(-count // world_size)
    return [mine[i : i + batch_size] for i in range(0, most, batch_size)]


def batches_on(
    device: torch.device,
    samples: Sequence[S],
    objective: Objective[S],
    batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[tuple[list[int], Batch]]:
    """This rank's batches on `device`, of samples of like length, with the indices of their samples; where a rank has
    none left, no indices and the first sample, for a forward pass whose result nobody counts.
    """
    order = np.argsort(lengths_of(samples, objective), kind="stable").tolist()  # little padding in a batch
    for places in rank_batches(len(samples), batch_size, rank, world_size):
        indices = [order[place] for place in places]
        batch = objective.batch([samples[i] for i in indices] or samples[:1])
        yield indices, {name: value.to(device) for name, value in batch.items()}


@torch.no_grad()
def mean_loss(
    model: nn.Module, samples: Sequence[Any], objective: Objective[Any], batch_size: int, rank: int, world_size: int
) -> float:
    """Mean loss per unit over all `samples`, each counted once whatever the world size.

    Collective. The model is in evaluation mode meanwhile. A signal is left for later: between two steps, where the
    loop asks for this, there is something to save first.
    """
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64)
    was_training = model.training
    model.eval()
    for indices, batch in batches_on(device, samples, objective, batch_size, rank, world_size):
        loss = objective.loss(model, batch)
        if indices:
            units = sum(objective.units(samples[i]) for i in indices)
            total += torch.tensor([float(loss), float(units)], dtype=torch.float64)
    model.train(was_training)
    total = total.to(device)
    if world_size > 1:
        dist.all_reduce(total)
    return float(total[0] / total[1])


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
        exit_if_preempted()
    model.train(was_training)
    if world_size > 1:
        dist.all_reduce(losses)
        dist.all_reduce(choices)
        dist.all_reduce(units)
    return float(losses.sum()) / float(units), choices.tolist()
