"""The objective of extractive question answering: cross-entropy of the answer's first and last token.

Source: Devlin et al., 2019, https://arxiv.org/abs/1810.04805, sections 4.2 and 4.3, and its SQuAD script.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparse_llm_ft.data.collate import Batch
from sparse_llm_ft.data.spans import SpanSample, collate_spans
from sparse_llm_ft.model.causal_mask import padded_right
from sparse_llm_ft.objectives.base import Forward, largest_share


@dataclass(frozen=True)
class SpanObjective:
    """Mean cross-entropy of the answer's first and last token; a unit is a window of a context.

    Padding has probability 0, so a window's loss does not depend on its batch.
    """

    pad_token_id: int

    def batch(self, samples: Sequence[SpanSample]) -> Batch:
        """The tensors of `collate_spans`."""
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
        """(batch,) int64: 1 if the most probable start and end are both correct, else 0."""
        starts, ends = self.logits(forward, batch)
        right = (starts.argmax(-1) == batch["start_positions"]) & (ends.argmax(-1) == batch["end_positions"])
        return right.long()

    def losses_and_predictions(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Not available for spans: use `choose_spans`.

        Raises:
            TypeError: always.
        """
        raise TypeError("spans are not labels; use choose_spans")

    def units(self, sample: SpanSample) -> int:
        """Always 1: the unit is a window."""
        return 1

    def scored(self, sample: SpanSample) -> int:
        """Always 1: the unit is a window."""
        return 1

    def tokens(self, sample: SpanSample) -> int:
        """Number of tokens of question and window."""
        return len(sample.ids)

    def majority(self, samples: Iterable[SpanSample]) -> float:
        """Share of the most frequent span, usually "no answer"."""
        return largest_share((sample.start, sample.end) for sample in samples)

    def logits(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of starts and of ends, each (batch, longest) float32, -inf at padding. The target positions are
        withheld, or the model would compute its own loss.
        """
        inputs = {name: value for name, value in batch.items() if not name.endswith("_positions")}
        with padded_right():
            output = forward(**inputs)
        padding = batch["attention_mask"] == 0
        starts, ends = (
            values.float().masked_fill(padding, -torch.inf) for values in (output.start_logits, output.end_logits)
        )
        return starts, ends
