"""What is learned: the loss of a batch, who is right in it, and in what units both are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from sparse_llm_ft.data.collate import Batch

Forward = Callable[..., Any]
"""The model, bare or under PEFT, or an engine around it; called with the tensors of a batch by name."""

S = TypeVar("S", contravariant=True)


class Objective(Protocol[S]):
    """How samples become a loss. Everything about a batch is computed from its tensors: a caller may repeat them along
    dimension 0.
    """

    def batch(self, samples: Sequence[S]) -> Batch:
        """The samples' tensors on the CPU; each has the batch as dimension 0."""
        ...

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Scalar float32: the loss summed over all units of the batch."""
        ...

    def losses(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) float32: each sample's summed loss."""
        ...

    def correct(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) int64: how many of each sample's scored units are right."""
        ...

    def judge(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """From one forward pass, `losses` and (batch,) int64 the labels chosen; for tasks with labels only."""
        ...

    def units(self, sample: S) -> int:
        """Units of the loss: what a mean loss is a mean over."""
        ...

    def scored(self, sample: S) -> int:
        """Units that `correct` counts."""
        ...

    def tokens(self, sample: S) -> int:
        """All tokens that the model sees."""
        ...

    def majority(self, samples: Iterable[S]) -> float:
        """Share of the most frequent right answer among all scored units: what always giving it would reach."""
        ...


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode; every module gets its own mode back at the end, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def largest_share(answers: Iterable[Any]) -> float:
    """Share of the most frequent answer, 0 to 1."""
    counts = Counter(answers)
    return max(counts.values()) / counts.total()


def lengths_of(samples: Sequence[Any], objective: Objective[Any]) -> np.ndarray:
    """(samples,) int32: each sample's tokens; a cached dataset knows them without building its samples."""
    known = getattr(samples, "lengths", None)
    return np.array([objective.tokens(sample) for sample in samples], dtype=np.int32) if known is None else known
