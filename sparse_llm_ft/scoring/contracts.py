"""What the caller hands in: how ratios are derived, and which share of the work a rank has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sparse_llm_ft.errors import ConfigError

MeasureName = Literal["svd", "snip", "imp"]
Metric = Literal["accuracy", "loss"]


@dataclass(frozen=True)
class DerivationSettings:
    """How ratios are derived.

    Attributes:
        importance: which indices go first.
        accuracy_floor: share of the metric that must be left, 0 to 1; 0.9 in the paper.
        floor_metric: ``accuracy``: zero while accuracy >= accuracy_floor * μ. ``loss``: zero while the mean loss is at
            most that of the whole model / accuracy_floor.
        micro_batch_size: samples in one forward pass.
        candidates_per_forward: cuts of one search that are tried in one forward pass, by repeating the batch; a pass
            then has as many times more samples. 1 is bisection, which computes least; more saves passes.
        flow_preservation: cut in the order that `preserve_flow` gives.
    """

    importance: MeasureName = "svd"
    accuracy_floor: float = 0.9
    floor_metric: Metric = "accuracy"
    micro_batch_size: int = 8
    candidates_per_forward: int = 1
    flow_preservation: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.accuracy_floor <= 1.0:
            raise ConfigError("method.accuracy_floor", f"{self.accuracy_floor!r}", "expected more than 0, at most 1")
        if self.micro_batch_size < 1 or self.candidates_per_forward < 1:
            raise ValueError("micro_batch_size and candidates_per_forward are at least 1")


def whole(module: nn.Module) -> AbstractContextManager[Any]:
    """For `WorkShard.gather` where parameters are not sharded."""
    return nullcontext()


def alone(tensor: torch.Tensor) -> torch.Tensor:
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
    gather: Callable[[nn.Module], AbstractContextManager[Any]] = whole
    reduce: Callable[[torch.Tensor], torch.Tensor] = alone


ALONE = WorkShard()
