"""Learning through a classification head: labels by cross-entropy, scores by squared error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparse_llm_ft.data.collate import Batch, collate_classification
from sparse_llm_ft.data.samples import TextSample
from sparse_llm_ft.objectives.base import Forward, largest_share


@dataclass(frozen=True)
class ClassificationObjective:
    """Cross-entropy of a classification head; a unit is a sample."""

    pad_token_id: int

    def batch(self, samples: Sequence[TextSample]) -> Batch:
        """The samples' tensors, as `collate_classification` lays them out."""
        return collate_classification(samples, self.pad_token_id)

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Scalar float32: summed over the samples."""
        return self.losses(forward, batch).sum()

    def losses(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) float32: each sample's loss."""
        return F.cross_entropy(_outputs(forward, batch), batch["labels"], reduction="none")

    def correct(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) int64: 1 where the sample is right, else 0."""
        return (_outputs(forward, batch).argmax(-1) == batch["labels"]).long()

    def judge(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch,) losses and (batch,) labels chosen."""
        logits = _outputs(forward, batch)
        return F.cross_entropy(logits, batch["labels"], reduction="none"), logits.argmax(-1)

    def units(self, sample: TextSample) -> int:
        """One: the loss is counted by samples."""
        return 1

    def scored(self, sample: TextSample) -> int:
        """One: a sample is right or wrong as a whole."""
        return 1

    def tokens(self, sample: TextSample) -> int:
        """Tokens of the text or the pair."""
        return sample.length

    def majority(self, samples: Iterable[TextSample]) -> float:
        """Share of the most frequent label."""
        return largest_share(sample.label for sample in samples)


@dataclass(frozen=True)
class RegressionObjective(ClassificationObjective):
    """Squared error of a head with one output; a unit is a sample.

    A sample is right if its output is within a quarter of its score. Papers report no such accuracy, but a derivation
    needs one to set its floor.
    """

    def losses(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) float32: each sample's loss."""
        return self.judge(forward, batch)[0]

    def correct(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) int64: 1 where the sample is right, else 0."""
        outputs = _outputs(forward, batch).squeeze(-1)
        return ((outputs - batch["labels"]).abs() <= 0.25).long()

    def judge(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch,) losses and (batch,) outputs."""
        outputs = _outputs(forward, batch).squeeze(-1)
        return (outputs - batch["labels"]).square(), outputs

    def majority(self, samples: Iterable[TextSample]) -> float:
        """Share of the samples whose score lies within a quarter of the most frequent one."""
        return largest_share(round(2 * sample.label) for sample in samples)


def _outputs(forward: Forward, batch: Batch) -> torch.Tensor:
    """Logits (batch, outputs) float32. The model does not get the labels, from which it would compute its own loss."""
    return forward(**{name: value for name, value in batch.items() if name != "labels"}).logits.float()
