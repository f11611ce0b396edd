"""`Objective`: the loss of a batch, its correct predictions, and the units of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from sparse_llm_ft.data.collate import Batch
from sparse_llm_ft.model.layers import uncompiled

Forward = Callable[..., Any]
"""The model, with or without PEFT or an engine around it; takes a batch's tensors by name."""

S = TypeVar("S", contravariant=True)


class Objective(Protocol[S]):
    """How samples become a loss. All results depend on the batch's tensors alone, so a caller may repeat them along
    dimension 0.
    """

    def batch(self, samples: Sequence[S]) -> Batch:
        """The samples' tensors on the CPU. Dimension 0 is the batch, but for lengths of packed samples."""
        ...

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Scalar float32: the loss summed over all units of the batch."""
        ...

    def losses(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) float32: each sample's summed loss."""
        ...

    def correct(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) int64: each sample's correct units, of the `scored` ones."""
        ...

    def losses_and_predictions(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """`losses`, and (batch,) predicted labels (int64) or scores (float32), from one forward pass."""
        ...

    def units(self, sample: S) -> int:
        """Number of loss units; a mean loss is a mean over them."""
        ...

    def scored(self, sample: S) -> int:
        """Number of units that `correct` checks."""
        ...

    def tokens(self, sample: S) -> int:
        """Number of tokens that the model sees."""
        ...

    def majority(self, samples: Iterable[S]) -> float:
        """Accuracy of always predicting the most frequent target, 0 to 1."""
        ...


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the context, without compiled layers; each module's own mode is restored at the end, also
    after an error.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with uncompiled(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def largest_share(answers: Iterable[Any]) -> float:
    """Share of the most frequent answer, 0 to 1."""
    counts = Counter(answers)
    return max(counts.values()) / counts.total()


def lengths_of(samples: Sequence[Any], objective: Objective[Any]) -> np.ndarray:
    """(samples,) int32, the tokens of each sample; a cached dataset has them stored."""
    known = getattr(samples, "lengths", None)
    return np.array([objective.tokens(sample) for sample in samples], dtype=np.int32) if known is None else known
