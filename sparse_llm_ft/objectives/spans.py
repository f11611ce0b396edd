"""Answers as spans of a context: the loss of their first and last token.

Source: Devlin et al., 2019, https://arxiv.org/abs/1810.04805, section 4.2 and 4.3, and its script for SQuAD.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparse_llm_ft.data.collate import Batch
from sparse_llm_ft.data.spans import SpanSample, collate_spans
from sparse_llm_ft.objectives.base import Forward


@dataclass(frozen=True)
class SpanObjective:
    """Cross-entropy of the answer's first and last token, their mean; a unit is a window of a context.

    Padding has no probability, so that a window's loss does not depend on what else is in its batch.
    """

    pad_token_id: int

    def batch(self, samples: Sequence[SpanSample]) -> Batch:
        """The windows' tensors, as `collate_spans` lays them out."""
        return collate_spans(samples, self.pad_token_id)

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Scalar float32: summed over the windows."""
        return self.losses(forward, batch).sum()

    def losses(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) float32: each window's loss."""
        starts, ends = self.logits(forward, batch)
        start_losses = F.cross_entropy(starts, batch["start_positions"], reduction="none")
        return (start_losses + F.cross_entropy(ends, batch["end_positions"], reduction="none")) / 2

    def correct(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) int64: 1 where both the most probable start and the most probable end are right."""
        starts, ends = self.logits(forward, batch)
        right = (starts.argmax(-1) == batch["start_positions"]) & (ends.argmax(-1) == batch["end_positions"])
        return right.long()

    def judge(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Spans are no labels: see `choose_spans`.

        Raises:
            TypeError: always.
        """
        raise TypeError("spans are no labels; choose_spans finds them")

    def units(self, sample: SpanSample) -> int:
        """One: the loss is counted by windows."""
        return 1

    def scored(self, sample: SpanSample) -> int:
        """One: a window is right or wrong as a whole."""
        return 1

    def tokens(self, sample: SpanSample) -> int:
        """Tokens of question and window."""
        return len(sample.ids)

    def majority(self, samples: Iterable[SpanSample]) -> float:
        """Share of the most frequent place, which is most often that of no answer."""
        places = Counter((sample.start, sample.end) for sample in samples)
        return max(places.values()) / places.total()

    def logits(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, longest) float32 of starts and of ends; -inf at padding. The model does not get the positions, from
        which it would compute its own loss.
        """
        inputs = {name: value for name, value in batch.items() if not name.endswith("_positions")}
        output = forward(**inputs)
        padding = batch["attention_mask"] == 0
        starts, ends = (
            values.float().masked_fill(padding, -torch.inf) for values in (output.start_logits, output.end_logits)
        )
        return starts, ends
