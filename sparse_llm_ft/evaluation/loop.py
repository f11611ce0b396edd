"""Forward passes over samples split among ranks: mean loss and predicted labels."""

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
from sparse_llm_ft.io.wait import Wait
from sparse_llm_ft.objectives.base import Objective, evaluating, lengths_of

S = TypeVar("S")
IndexedBatch = tuple[list[int], Batch]
"""A batch's sample indices, and its tensors."""


def rank_batches(count: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Split indices 0..count-1 among ranks and into batches; every rank gets equally many batches.

    Under ZeRO-3 a forward pass is a collective, so a rank without samples left must take part: it gets an empty batch.
    """
    mine = list(range(rank, count, world_size))
    largest = -(-count // world_size)
    return [mine[i : i + batch_size] for i in range(0, largest, batch_size)]


@contextmanager
def evaluation_batches(
    model: nn.Module,
    samples: Sequence[S],
    lengths: Sequence[int] | np.ndarray,
    collate: Callable[[Sequence[S]], Batch],
    batch_size: int,
    rank: int,
    world_size: int,
    wait: Wait | None = None,
) -> Iterator[Iterator[IndexedBatch]]:
    """Collective. This rank's batches on the model's device, in evaluation mode without gradients. Each module's own
    mode is restored at the end, also after an error.

    A batch has samples of similar length. A rank without samples left gets an empty list of indices and the first
    sample, for a forward pass whose result is ignored.

    Args:
        lengths: (samples,), the tokens of each sample.
        wait: shows how many batches are done.

    Raises:
        PreemptionRequested: on every rank, while the batches are consumed.
    """
    with evaluating(model), torch.no_grad():
        device = next(model.parameters()).device
        order = np.argsort(lengths, kind="stable").tolist()  # saves padding
        places = rank_batches(len(samples), batch_size, rank, world_size)
        rows = [[order[place] for place in row] for row in places]
        yield _collated(rows, samples, collate, device, wait)


def _collated(
    rows: list[list[int]],
    samples: Sequence[S],
    collate: Callable[[Sequence[S]], Batch],
    device: torch.device,
    wait: Wait | None,
) -> Iterator[IndexedBatch]:
    for done, indices in enumerate(rows, 1):
        batch = collate([samples[i] for i in indices or [0]])
        yield indices, {name: value.to(device) for name, value in batch.items()}
        if wait is not None:
            wait.at(done, len(rows))
        exit_if_preempted()


def mean_loss(
    model: nn.Module,
    samples: Sequence[Any],
    objective: Objective[Any],
    batch_size: int,
    rank: int,
    world_size: int,
    wait: Wait | None = None,
) -> float:
    """Collective. Mean loss per unit over all `samples`; each counts once whatever the world size.

    Raises:
        PreemptionRequested: see `evaluation_batches`.
    """
    total = torch.zeros(2, dtype=torch.float64)
    lengths = lengths_of(samples, objective)
    with evaluation_batches(
        model, samples, lengths, objective.batch, batch_size, rank, world_size, wait=wait
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


def predict_labels(
    model: nn.Module,
    samples: Sequence[Any],
    objective: Objective[Any],
    batch_size: int,
    rank: int,
    world_size: int,
    wait: Wait | None = None,
) -> tuple[float, list[float]]:
    """Collective. Every rank gets the mean loss per unit (see `mean_loss`) and every sample's predicted label index or
    score, in order.
    """
    device = next(model.parameters()).device
    # Each rank fills in its own samples; the all-reduce collects them.
    losses = torch.zeros(len(samples), dtype=torch.float64, device=device)
    predictions = torch.zeros(len(samples), dtype=torch.float64, device=device)
    units = torch.zeros((), dtype=torch.float64, device=device)
    lengths = lengths_of(samples, objective)
    with evaluation_batches(
        model, samples, lengths, objective.batch, batch_size, rank, world_size, wait=wait
    ) as batches:
        for indices, batch in batches:
            loss, predicted = objective.losses_and_predictions(model, batch)
            losses[indices] = loss[: len(indices)].double()
            units += sum(objective.units(samples[i]) for i in indices)
            predictions[indices] = predicted[: len(indices)].double()
    if world_size > 1:
        dist.all_reduce(losses)
        dist.all_reduce(predictions)
        dist.all_reduce(units)
    return float(losses.sum()) / float(units), predictions.tolist()
