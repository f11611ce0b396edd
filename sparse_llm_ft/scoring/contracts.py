"""What the caller hands in: how a batch is scored, and how the work is split over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

Forward = Callable[..., Any]
Batch = dict[str, torch.Tensor]


class Objective(Protocol):
    """The part of an objective that scoring needs; every tensor of a batch has the samples as dimension 0."""

    def batch(self, samples: Sequence[Any]) -> Batch:
        """The samples' tensors, on any device."""
        ...

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Scalar: the loss summed over all units of the batch."""
        ...

    def losses(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,): each sample's summed loss."""
        ...

    def correct(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,): how many of each sample's scored units are right."""
        ...

    def units(self, sample: Any) -> int:
        """Units of the loss of a sample."""
        ...

    def scored(self, sample: Any) -> int:
        """Units of `correct` of a sample."""
        ...

    def majority(self, samples: Sequence[Any]) -> float:
        """Share of the most frequent right answer among all scored units."""
        ...


def whole(module: nn.Module) -> AbstractContextManager[Any]:
    """For `Split.gather` where parameters are not sharded."""
    return nullcontext()


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """For `Split.reduce` where there is one rank."""
    return tensor


@dataclass(frozen=True)
class Split:
    """Which share of the work this process has; the default is all of it.

    Every rank has the whole of D_t and the whole model (or its shard, with `lockstep`).

    Attributes:
        rank, size: of the process group.
        lockstep: a forward pass is a collective (ZeRO-3): every rank must make equally many, each through the same
            layers.
        gather: a context in which the module's own parameters are whole on every rank; a collective where `lockstep`.
        reduce: sum of a CPU tensor over all ranks, on the CPU; a collective.
    """

    rank: int = 0
    size: int = 1
    lockstep: bool = False
    gather: Callable[[nn.Module], AbstractContextManager[Any]] = whole
    reduce: Callable[[torch.Tensor], torch.Tensor] = alone


ALONE = Split()
