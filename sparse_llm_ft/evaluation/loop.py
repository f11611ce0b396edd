"""Forward passes over samples that are dealt to all ranks: the mean loss, and the labels chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from sparse_llm_ft.data.collate import Batch
from sparse_llm_ft.distributed.signals import exit_if_preempted
from sparse_llm_ft.objectives.base import Objective, evaluating, lengths_of

S = TypeVar("S")
IndexedBatch = tuple[list[int], Batch]
"""The indices of the samples in a batch, and their tensors."""


def rank_batches(count: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Indices 0..count-1 dealt to ranks and cut into batches; every rank gets as many batches.

    Under ZeRO-3 a forward pass is a collective, so a rank without samples left must still take part: it gets an
    empty batch.
    """
    mine = list(range(rank, count, world_size))
    most = -(-count // world_size)
    return [mine[i : i + batch_size] for i in range(0, most, batch_size)]


@contextmanager
def evaluation_batches(
    model: nn.Module,
    samples: Sequence[S],
    lengths: Sequence[int] | np.ndarray,
    collate: Callable[[Sequence[S]], Batch],
    batch_size: int,
    rank: int,
    world_size: int,
    preemptible: bool = True,
) -> Iterator[Iterator[IndexedBatch]]:
    """Collective. Yield this rank's batches on the model's device, for forward passes in evaluation mode without
    gradients. Every module gets its own mode back at the end, also after an error.

    A batch holds samples of like length. A rank that has no samples left gets no indices and the first sample, for a
    forward pass whose result nobody counts.

    Args:
        lengths: (samples,) tokens of each.
        preemptible: whether a signal ends the run after a batch; else it waits until the caller looks.

    Raises:
        PreemptionRequested: on every rank, while the batches are read.
    """
    with evaluating(model), torch.no_grad():
        device = next(model.parameters()).device
        order = np.argsort(lengths, kind="stable").tolist()  # little padding in a batch
        places = rank_batches(len(samples), batch_size, rank, world_size)
        yield _collated([[order[place] for place in row] for row in places], samples, collate, device, preemptible)


def _collated(
    rows: list[list[int]],
    samples: Sequence[S],
    collate: Callable[[Sequence[S]], Batch],
    device: torch.device,
    preemptible: bool,
) -> Iterator[IndexedBatch]:
    for indices in rows:
        batch = collate([samples[i] for i in indices or [0]])
        yield indices, {name: value.to(device) for name, value in batch.items()}
        if preemptible:
            exit_if_preempted()


def mean_loss(
    model: nn.Module, samples: Sequence[Any], objective: Objective[Any], batch_size: int, rank: int, world_size: int
) -> float:
    """Collective. Mean loss per unit over all `samples`, each counted once whatever the world size.

    A signal waits: the training loop, which calls this between two steps, saves before it stops.
    """
    total = torch.zeros(2, dtype=torch.float64)
    lengths = lengths_of(samples, objective)
    with evaluation_batches(
        model, samples, lengths, objective.batch, batch_size, rank, world_size, preemptible=False
    ) as batches:
        for indices, batch in batches:
            loss = objective.loss(model, batch)
            if indices:
                units = sum(objective.units(samples[i]) for i in indices)
                total += torch.tensor([float(loss), float(units)], dtype=torch.float64)
    total = total.to(next(model.parameters()).device)
    if world_size > 1:
        dist.all_reduce(total)
    return float(total[0] / total[1])


def choose_labels(
    model: nn.Module, samples: Sequence[Any], objective: Objective[Any], batch_size: int, rank: int, world_size: int
) -> tuple[float, list[float]]:
    """Collective. The mean loss per unit, as by `mean_loss`, and for every sample, in order, on every rank, the label
    chosen or, in a regression, the score.
    """
    device = next(model.parameters()).device
    # The rank that judged a sample fills in its values; their sum over ranks is everybody's.
    losses = torch.zeros(len(samples), dtype=torch.float64, device=device)
    choices = torch.zeros(len(samples), dtype=torch.float64, device=device)
    units = torch.zeros((), dtype=torch.float64, device=device)
    lengths = lengths_of(samples, objective)
    with evaluation_batches(model, samples, lengths, objective.batch, batch_size, rank, world_size) as batches:
        for indices, batch in batches:
            loss, choice = objective.judge(model, batch)
            losses[indices] = loss[: len(indices)].double()
            units += sum(objective.units(samples[i]) for i in indices)
            choices[indices] = choice[: len(indices)].double()
    if world_size > 1:
        dist.all_reduce(losses)
        dist.all_reduce(choices)
        dist.all_reduce(units)
    return float(losses.sum()) / float(units), choices.tolist()
