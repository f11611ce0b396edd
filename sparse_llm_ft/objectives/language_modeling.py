"""Objectives of generating models: cross-entropy of a completion, for decoders and encoder-decoders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from sparse_llm_ft.data.collate import IGNORE_INDEX, Batch, collate_causal_lm, collate_packed, collate_seq2seq
from sparse_llm_ft.data.samples import Pack, Sample
from sparse_llm_ft.model.causal_mask import padded_right
from sparse_llm_ft.model.head_loss import head_targets
from sparse_llm_ft.objectives.base import Forward, largest_share


@dataclass(frozen=True, eq=False)
class LabelWords:
    """The token by which the label words of a classification differ.

    Attributes:
        tokens: (labels,) int64, each word's token at `position`.
        position: the completion's first token that differs between labels.
    """

    tokens: torch.Tensor
    position: int


@dataclass(frozen=True, eq=False)
class CompletionObjective:
    """Cross-entropy of the completion; a unit is a token of it.

    With label words, a sample is correct if its own word has the largest logit among all words at the token where they
    differ. Without, each completion token is correct that has the largest logit given all tokens before it.

    Args:
        keeps_logits: whether the model takes ``logits_to_keep``; then it computes logits only at positions that
            some sample of the batch supervises.
        label_words: None if the task has no labels.
        packs_in_one_row: whether to concatenate packs: transformers' flash attention separates samples by their
            positions only in a batch of one row.
        takes_lengths: whether the model's attention takes the lengths of samples in one row.
    """

    pad_token_id: int
    keeps_logits: bool
    label_words: LabelWords | None = None
    packs_in_one_row: bool = False
    takes_lengths: bool = False

    def batch(self, samples: Sequence[Sample] | Sequence[Pack]) -> Batch:
        """The tensors of `collate_causal_lm` for samples, of `collate_packed` for packs; and ``supervised`` (B, P), the
        positions that have a loss in some sample, once a row: on a GPU, asking the labels for them would wait for it.
        """
        if samples and isinstance(samples[0], Pack):
            batch = collate_packed(samples, self.pad_token_id, self.packs_in_one_row)  # type: ignore[arg-type]
        else:
            batch = collate_causal_lm(samples, self.pad_token_id)  # type: ignore[arg-type]
        labels = batch["labels"]
        return batch | {"supervised": _supervised(labels).expand(len(labels), -1)}

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Scalar float32: summed over the completion tokens. A lean head computes it (model/head_loss.py)."""
        logits, targets = self._predict(forward, batch, in_head=True)
        if logits.ndim == 0:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")

    def losses(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) float32: summed over each completion's tokens."""
        return _summed(*self._predict(forward, batch))

    def correct(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) int64: 0 or 1 with label words, else the number of correct tokens."""
        logits, targets = self._predict(forward, batch)
        if self.label_words is None:
            return (logits.argmax(-1) == targets).sum(1)  # IGNORE_INDEX equals no token
        predicted, target = _predict_labels(logits, targets, self.label_words)
        return (predicted == target).long()

    def losses_and_predictions(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch,) losses and (batch,) predicted labels."""
        assert self.label_words is not None, "the task has no labels to choose from"
        logits, targets = self._predict(forward, batch)
        return _summed(logits, targets), _predict_labels(logits, targets, self.label_words)[0]

    def units(self, sample: Sample | Pack) -> int:
        """Number of completion tokens."""
        return sample.supervised

    def scored(self, sample: Sample | Pack) -> int:
        """1 with label words, else the number of completion tokens."""
        return sample.supervised if self.label_words is None else 1

    def tokens(self, sample: Sample | Pack) -> int:
        """Number of tokens of prompt and completion."""
        return sample.length

    def majority(self, samples: Iterable[Sample]) -> float:
        """Share of the most frequent label, or of the most frequent token of all completions."""
        if self.label_words is not None:
            return largest_share(sample.label for sample in samples)
        return largest_share(token for sample in samples for token in sample.completion_ids)

    def _predict(self, forward: Forward, batch: Batch, in_head: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, P, V) float32 and targets (B, P) at the P positions that some sample supervises.

        Args:
            in_head: whether the loss, a scalar, may come in place of logits.
        """
        labels = batch["labels"]
        positions = batch["supervised"][0] if "supervised" in batch else _supervised(labels)  # Shape: (P,)
        options: dict[str, Any] = {"logits_to_keep": positions} if self.keeps_logits else {}
        options |= self._attention(batch)
        targets = labels[:, positions + 1]
        with (
            padded_right() if "attention_mask" in options else nullcontext(),
            head_targets(targets) if in_head and self.keeps_logits else nullcontext(),
        ):
            output = forward(input_ids=batch["input_ids"], use_cache=False, **options)
        logits = output.logits if self.keeps_logits else output.logits[:, positions]  # Shape: (B, P, V)
        return logits.float(), targets

    def _attention(self, batch: Batch) -> dict[str, Any]:
        """What attention is told of the batch's rows. transformers separates packed samples by their positions if it
        gets no mask, and under flash attention by lengths: without them it would ask the device for those of one row,
        in every layer.
        """
        packed, (rows, width) = "position_ids" in batch, batch["input_ids"].shape
        if rows > 1 or not self.takes_lengths:
            name = "position_ids" if packed else "attention_mask"
            return {name: batch[name]}
        if packed:
            places, longest = batch["cu_seq_lens"], int(batch["max_length"])
        else:  # not padded, since nothing is longer
            device = batch["input_ids"].device
            places, longest = width * torch.arange(2, dtype=torch.int32, device=device), width
        lengths = {"cu_seq_lens_q": places, "cu_seq_lens_k": places, "max_length_q": longest, "max_length_k": longest}
        known = ("attention_mask", "position_ids") if packed else ("attention_mask",)
        return lengths | {name: batch[name] for name in known}


@dataclass(frozen=True, eq=False)
class Seq2SeqObjective(CompletionObjective):
    """`CompletionObjective` of an encoder-decoder, whose decoder predicts every token of the completion.

    Args:
        start_token_id: the decoder's first input token.
    """

    start_token_id: int = 0

    def batch(self, samples: Sequence[Any]) -> Batch:
        """The tensors of `collate_seq2seq`."""
        return collate_seq2seq(samples, self.pad_token_id, self.start_token_id)

    def _predict(self, forward: Forward, batch: Batch, in_head: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return forward(**inputs, use_cache=False).logits.float(), batch["labels"]


def _supervised(labels: torch.Tensor) -> torch.Tensor:
    """(P,) positions whose logits some sample of labels (B, L) needs: those at t predict the token at t + 1."""
    return (labels[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)


def _predict_labels(
    logits: torch.Tensor, targets: torch.Tensor, words: LabelWords
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) predicted and (B,) target labels, from logits (B, P, V) and targets (B, P) where the words differ."""
    tokens = words.tokens.to(logits.device)
    rows = torch.arange(len(targets), device=logits.device)
    place = (targets != IGNORE_INDEX).int().argmax(1) + words.position  # Shape: (B,)
    predicted = logits[rows, place][:, tokens].argmax(-1)
    target = (targets[rows, place].unsqueeze(1) == tokens).int().argmax(1)
    return predicted, target


def _summed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(B,) cross-entropy of (B, P, V) logits summed over each row's targets (B, P)."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return losses.view_as(targets).sum(1)
