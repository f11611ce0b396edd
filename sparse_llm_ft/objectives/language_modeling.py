"""Learning to write: cross-entropy of a completion, by a decoder or an encoder-decoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from sparse_llm_ft.data.collate import IGNORE_INDEX, Batch, collate_causal_lm, collate_packed, collate_seq2seq
from sparse_llm_ft.data.samples import Pack, Sample
from sparse_llm_ft.objectives.base import Forward, largest_share


@dataclass(frozen=True, eq=False)
class LabelWords:
    """Where the words of a classification's labels differ, token by token.

    Attributes:
        tokens: (labels,) int64: each word's token at `position` of the completion, before which all are alike.
    """

    tokens: torch.Tensor
    position: int


@dataclass(frozen=True, eq=False)
class CompletionObjective:
    """Cross-entropy of the completion; a unit is a token of it.

    With label words, a sample is right if its own word has the largest logit among the words where they first differ.
    Without, every token of the completion is right that has the largest logit given all tokens before it.

    Args:
        keeps_logits: whether the model takes ``logits_to_keep``; then it computes logits only at positions that
            some sample of the batch supervises.
        label_words: None where the task has no labels.
        packs_in_one_row: whether packs are laid behind each other: transformers' flash attention looks for samples by
            their positions only in a batch of one row.
    """

    pad_token_id: int
    keeps_logits: bool
    label_words: LabelWords | None = None
    packs_in_one_row: bool = False

    def batch(self, samples: Sequence[Sample] | Sequence[Pack]) -> Batch:
        """The tensors of samples, as `collate_causal_lm` lays them out, or of packs, as `collate_packed` does."""
        if samples and isinstance(samples[0], Pack):
            return collate_packed(samples, self.pad_token_id, self.packs_in_one_row)  # type: ignore[arg-type]
        return collate_causal_lm(samples, self.pad_token_id)  # type: ignore[arg-type]

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Scalar float32: summed over the completion tokens."""
        logits, targets = self._predict(forward, batch)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")

    def losses(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) float32: summed over each completion's tokens."""
        return _summed(*self._predict(forward, batch))

    def correct(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) int64: 0 or 1 with label words, else the number of right tokens."""
        logits, targets = self._predict(forward, batch)
        if self.label_words is None:
            return (logits.argmax(-1) == targets).sum(1)  # IGNORE_INDEX equals no token
        choices, right = _choose(logits, targets, self.label_words)
        return (choices == right).long()

    def judge(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch,) losses and (batch,) labels chosen."""
        assert self.label_words is not None, "the task has no labels to choose from"
        logits, targets = self._predict(forward, batch)
        return _summed(logits, targets), _choose(logits, targets, self.label_words)[0]

    def units(self, sample: Sample | Pack) -> int:
        """Number of tokens in the completion."""
        return sample.supervised

    def scored(self, sample: Sample | Pack) -> int:
        """1 with label words, else the tokens of the completion."""
        return sample.supervised if self.label_words is None else 1

    def tokens(self, sample: Sample | Pack) -> int:
        """Tokens of prompt and completion."""
        return sample.length

    def majority(self, samples: Iterable[Sample]) -> float:
        """Share of the most frequent label, or of the most frequent token of all completions."""
        if self.label_words is not None:
            return largest_share(sample.label for sample in samples)
        return largest_share(token for sample in samples for token in sample.completion_ids)

    def _predict(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, P, V) float32 and targets (B, P) at the P positions that some sample supervises."""
        labels = batch["labels"]
        # The logits at position t predict the token at t + 1.
        positions = (labels[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)  # Shape: (P,)
        options: dict[str, Any] = {"logits_to_keep": positions} if self.keeps_logits else {}
        # Without a mask, transformers tells packed samples apart by their positions.
        seen = "position_ids" if "position_ids" in batch else "attention_mask"
        output = forward(input_ids=batch["input_ids"], use_cache=False, **{seen: batch[seen]}, **options)
        logits = output.logits if self.keeps_logits else output.logits[:, positions]  # Shape: (B, P, V)
        return logits.float(), labels[:, positions + 1]


@dataclass(frozen=True, eq=False)
class Seq2SeqObjective(CompletionObjective):
    """`CompletionObjective` of an encoder-decoder, whose decoder predicts every token of the completion.

    Args:
        start_token_id: what the decoder begins with.
    """

    start_token_id: int = 0

    def batch(self, samples: Sequence[Any]) -> Batch:
        """The samples' tensors, as `collate_seq2seq` lays them out."""
        return collate_seq2seq(samples, self.pad_token_id, self.start_token_id)

    def _predict(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return forward(**inputs, use_cache=False).logits.float(), batch["labels"]


def _choose(logits: torch.Tensor, targets: torch.Tensor, words: LabelWords) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) the label chosen and (B,) the right one, both read off where the words differ first."""
    tokens = words.tokens.to(logits.device)
    rows = torch.arange(len(targets), device=logits.device)
    place = (targets != IGNORE_INDEX).int().argmax(1) + words.position  # Shape: (B,)
    choices = logits[rows, place][:, tokens].argmax(-1)
    right = (targets[rows, place].unsqueeze(1) == tokens).int().argmax(1)
    return choices, right


def _summed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(B,) cross-entropy of (B, P, V) logits summed over each row's targets (B, P)."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return losses.view_as(targets).sum(1)
