"""Objectives of a head: cross-entropy for labels, squared error for scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparse_llm_ft.data.collate import Batch, collate_classification
from sparse_llm_ft.data.samples import TextSample
from sparse_llm_ft.model.causal_mask import padded_right
from sparse_llm_ft.objectives.base import Forward, largest_share


@dataclass(frozen=True)
class ClassificationObjective:
    """Cross-entropy of a classification head; a unit is a sample."""

    pad_token_id: int

    def batch(self, samples: Sequence[TextSample]) -> Batch:
        """The tensors of `collate_classification`."""
        return collate_classification(samples, self.pad_token_id)

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Scalar float32: summed over the samples."""
        return self.losses(forward, batch).sum()

    def losses(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) float32: each sample's loss."""
        return F.cross_entropy(_outputs(forward, batch), batch["labels"], reduction="none")

    def correct(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) int64: 1 if the predicted label is correct, else 0."""
        return (_outputs(forward, batch).argmax(-1) == batch["labels"]).long()

    def losses_and_predictions(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch,) losses and (batch,) predicted labels."""
        logits = _outputs(forward, batch)
        return F.cross_entropy(logits, batch["labels"], reduction="none"), logits.argmax(-1)

    def units(self, sample: TextSample) -> int:
        """Always 1: the unit is a sample."""
        return 1

    def scored(self, sample: TextSample) -> int:
        """Always 1: the unit is a sample."""
        return 1

    def tokens(self, sample: TextSample) -> int:
        """Number of tokens of the text or the pair."""
        return sample.length

    def majority(self, samples: Iterable[TextSample]) -> float:
        """Share of the most frequent label."""
        return largest_share(sample.label for sample in samples)


@dataclass(frozen=True)
class RegressionObjective(ClassificationObjective):
    """Squared error of a head with one output; a unit is a sample.

    A sample counts as correct if its output is within 0.25 of its score. Papers do not report this accuracy; a
    derivation needs it for its floor.
    """

    def losses(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) float32: each sample's loss."""
        return self.losses_and_predictions(forward, batch)[0]

    def correct(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) int64: 1 if the output is within 0.25 of the score, else 0."""
        outputs = _outputs(forward, batch).squeeze(-1)
        return ((outputs - batch["labels"]).abs() <= 0.25).long()

    def losses_and_predictions(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch,) losses and (batch,) outputs."""
        outputs = _outputs(forward, batch).squeeze(-1)
        return (outputs - batch["labels"]).square(), outputs

    def majority(self, samples: Iterable[TextSample]) -> float:
        """Share of the most frequent score, rounded to 0.5."""
        return largest_share(round(2 * sample.label) for sample in samples)


def _outputs(forward: Forward, batch: Batch) -> torch.Tensor:
    """(batch, outputs) float32 logits. Labels are withheld, or the model would compute its own loss."""
    with padded_right():
        return forward(**{name: value for name, value in batch.items() if name != "labels"}).logits.float()
