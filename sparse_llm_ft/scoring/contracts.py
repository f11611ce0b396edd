"""What the caller hands in: which share of the work a rank has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


def no_gather(module: nn.Module) -> AbstractContextManager[Any]:
    """For `WorkShard.gather` where parameters are not sharded."""
    return nullcontext()


def no_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """For `WorkShard.reduce` where there is one rank."""
    return tensor


@dataclass(frozen=True)
class WorkShard:
    """This process's shard of the work, among those of all ranks; the default is all of it.

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
    gather: Callable[[nn.Module], AbstractContextManager[Any]] = no_gather
    reduce: Callable[[torch.Tensor], torch.Tensor] = no_reduce


ALONE = WorkShard()
