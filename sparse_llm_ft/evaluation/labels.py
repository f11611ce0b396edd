"""Classification: which labels a model chooses, and how good a choice that is."""

from __future__ import annotations

import math
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
) -> tuple[float, list[int]]:
    """The mean loss per unit, as by `mean_loss`, and the label chosen for every sample, in order, on every rank.

    Collective. The model is in evaluation mode meanwhile.
    """
    device = next(model.parameters()).device
    # Filled by the rank that judged a sample and summed over ranks.
    losses = torch.zeros(len(samples), dtype=torch.float64, device=device)
    choices = torch.zeros(len(samples), dtype=torch.long, device=device)
    was_training = model.training
    model.eval()
    for indices, batch in batches_on(device, samples, objective, batch_size, rank, world_size):
        loss, choice = objective.judge(model, batch)
        losses[indices] = loss[: len(indices)].double()
        choices[indices] = choice[: len(indices)]
        leave_if_asked()
    model.train(was_training)
    dist.all_reduce(losses)
    dist.all_reduce(choices)
    return float(losses.sum()) / sum(map(objective.units, samples)), choices.tolist()


def accuracy(choices: Sequence[int], labels: Sequence[int]) -> float:
    """Share of right choices in percent.

    Raises:
        ValueError: no choices, or not as many labels.
    """
    _check_lengths(choices, labels)
    return 100 * sum(choice == label for choice, label in zip(choices, labels, strict=True)) / len(labels)


def matthews(choices: Sequence[int], labels: Sequence[int]) -> float:
    """Matthews correlation coefficient in percent: Gorodkin's R_K (2004, eq. 8), for two classes Matthews' own.

    With s samples, c of them right, p_k chosen as k and t_k that are k:
    (c s - Σ p_k t_k) / sqrt((s² - Σ p_k²) (s² - Σ t_k²)); 0 where all choices or all labels are the same.

    Raises:
        ValueError: no choices, or not as many labels.
    """
    _check_lengths(choices, labels)
    confusion = torch.zeros((1 + max(*choices, *labels),) * 2, dtype=torch.long)  # Shape: (label, choice)
    for choice, label in zip(choices, labels, strict=True):
        confusion[label, choice] += 1
    total, right = int(confusion.sum()), int(confusion.trace())
    chosen, true = confusion.sum(0), confusion.sum(1)
    spread = (total**2 - int(chosen @ chosen)) * (total**2 - int(true @ true))
    return 100 * (right * total - int(chosen @ true)) / math.sqrt(spread) if spread else 0.0


def _check_lengths(choices: Sequence[int], labels: Sequence[int]) -> None:
    if not choices or len(choices) != len(labels):
        raise ValueError(f"{len(choices)} choices and {len(labels)} labels")
