"""`WorkShard`: a rank's share of the work, which the caller passes in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")
"""The type of samples."""


def no_gather(module: nn.Module) -> AbstractContextManager[object]:
    """`WorkShard.gather` for unsharded parameters."""
    return nullcontext()


def no_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """`WorkShard.reduce` for a single rank."""
    return tensor


@dataclass(frozen=True)
class WorkShard:
    """This process's share of the work; by default all of it.

    Every rank has all of D_t and the full model (with `lockstep`, its shard).

    Attributes:
        rank, size: of the process group.
        lockstep: a forward pass is a collective (ZeRO-3): all ranks must make equally many, through the same layers.
        gather: collective if `lockstep`; a context in which every rank has the module's own parameters unsharded.
        reduce: collective; the sum of a CPU tensor over all ranks, on the CPU.
    """

    rank: int = 0
    size: int = 1
    lockstep: bool = False
    gather: Callable[[nn.Module], AbstractContextManager[object]] = no_gather
    reduce: Callable[[torch.Tensor], torch.Tensor] = no_reduce


ALONE = WorkShard()
