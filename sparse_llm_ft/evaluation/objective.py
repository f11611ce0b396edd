"""What is learned: the loss of a batch, who is right in it, and in what units both are counted."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase

from sparse_llm_ft.data.encoding import (
    IGNORED,
    Batch,
    Sample,
    TextSample,
    completion_ids,
    text_batch,
    training_batch,
)
from sparse_llm_ft.data.tasks import Task, render
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.modeling import base_of, classifies

Forward = Callable[..., Any]
"""The model, bare or under PEFT, or an engine around it; called with the tensors of a batch by name."""

S = TypeVar("S", contravariant=True)


class Objective(Protocol[S]):
    """How samples become a loss. Everything about a batch is computed from its tensors, so that a caller may
    repeat them along dimension 0.
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
        """Units of `correct`."""
        ...

    def tokens(self, sample: S) -> int:
        """All tokens that the model sees."""
        ...

    def majority(self, samples: Iterable[S]) -> float:
        """Share of the most frequent right answer among all scored units: what always giving it would reach."""
        ...


@dataclass(frozen=True, eq=False)
class CompletionObjective:
    """Cross-entropy of the completion under a causal language model; a unit is a token of it.

    Right is, with label words, a sample whose own word has the largest logit among the words' first tokens; without,
    every token of the completion that has the largest logit given all before it.

    Args:
        keeps_logits: whether the model takes ``logits_to_keep``; then it computes logits only at positions that
            some sample of the batch supervises.
        label_tokens: (labels,) first token of each label word; None where the task has no labels.
    """

    pad_token_id: int
    keeps_logits: bool
    label_tokens: torch.Tensor | None = None

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """See `training_batch`."""
        return training_batch(samples, self.pad_token_id)

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Scalar float32: summed over the completion tokens."""
        logits, targets = self._predict(forward, batch)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def losses(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) float32: summed over each completion's tokens."""
        return _summed(*self._predict(forward, batch))

    def correct(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) int64: 0 or 1 with label words, else the number of right tokens."""
        logits, targets = self._predict(forward, batch)
        if self.label_tokens is None:
            return (logits.argmax(-1) == targets).sum(1)  # a target that is IGNORED equals no token
        choices, right = self._choose(logits, targets, self.label_tokens)
        return (choices == right).long()

    def judge(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch,) losses and (batch,) labels chosen."""
        assert self.label_tokens is not None, "the task has no labels to choose from"
        logits, targets = self._predict(forward, batch)
        return _summed(logits, targets), self._choose(logits, targets, self.label_tokens)[0]

    def units(self, sample: Sample) -> int:
        """Tokens of the completion."""
        return sample.supervised

    def scored(self, sample: Sample) -> int:
        """1 with label words, else the tokens of the completion."""
        return sample.supervised if self.label_tokens is None else 1

    def tokens(self, sample: Sample) -> int:
        """Tokens of prompt and completion."""
        return len(sample.prompt) + len(sample.completion)

    def majority(self, samples: Iterable[Sample]) -> float:
        """Share of the most frequent label, or of the most frequent token of all completions."""
        if self.label_tokens is not None:
            return _largest_share(sample.label for sample in samples)
        return _largest_share(token for sample in samples for token in sample.completion)

    def _predict(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, P, V) float32 and targets (B, P) at the P positions that some sample supervises."""
        labels = batch["labels"]
        # The logits at position t predict the token at t + 1.
        positions = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)  # Shape: (P,)
        options: dict[str, Any] = {"logits_to_keep": positions} if self.keeps_logits else {}
        output = forward(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **options
        )
        logits = output.logits if self.keeps_logits else output.logits[:, positions]  # Shape: (B, P, V)
        return logits.float(), labels[:, positions + 1]

    @staticmethod
    def _choose(
        logits: torch.Tensor, targets: torch.Tensor, label_tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) the label chosen and (B,) the right one, both read off at the first token of the completion."""
        words = label_tokens.to(logits.device)
        rows = torch.arange(len(targets), device=logits.device)
        first = (targets != IGNORED).int().argmax(1)  # Shape: (B,)
        choices = logits[rows, first][:, words].argmax(-1)
        right = (targets[rows, first].unsqueeze(1) == words).int().argmax(1)
        return choices, right


@dataclass(frozen=True)
class ClassificationObjective:
    """Cross-entropy of an encoder's classification head; a unit is a sample."""

    pad_token_id: int

    def batch(self, samples: Sequence[TextSample]) -> Batch:
        """See `text_batch`."""
        return text_batch(samples, self.pad_token_id)

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Scalar float32: summed over the samples."""
        return F.cross_entropy(self._predict(forward, batch), batch["labels"], reduction="sum")

    def losses(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) float32."""
        return F.cross_entropy(self._predict(forward, batch), batch["labels"], reduction="none")

    def correct(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """(batch,) int64: 0 or 1."""
        return (self._predict(forward, batch).argmax(-1) == batch["labels"]).long()

    def judge(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch,) losses and (batch,) labels chosen."""
        logits = self._predict(forward, batch)
        return F.cross_entropy(logits, batch["labels"], reduction="none"), logits.argmax(-1)

    def units(self, sample: TextSample) -> int:
        """1."""
        return 1

    def scored(self, sample: TextSample) -> int:
        """1."""
        return 1

    def tokens(self, sample: TextSample) -> int:
        """Tokens of the text or the pair."""
        return len(sample.ids)

    def majority(self, samples: Iterable[TextSample]) -> float:
        """Share of the most frequent label."""
        return _largest_share(sample.label for sample in samples)

    @staticmethod
    def _predict(forward: Forward, batch: Batch) -> torch.Tensor:
        """Logits (batch, labels) float32. The labels stay here: from them the model would make a loss of its own."""
        return forward(**{name: value for name, value in batch.items() if name != "labels"}).logits.float()


def make_objective(model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task) -> Objective[Any]:
    """The objective of `task` on `model`, of which only the class is looked at: an empty one will do.

    Raises:
        ConfigError: label words that begin with the same token.
    """
    assert isinstance(tokenizer.pad_token_id, int), "load_tokenizer made sure"
    if classifies(model):
        return ClassificationObjective(tokenizer.pad_token_id)
    keeps_logits = "logits_to_keep" in inspect.signature(base_of(model).forward).parameters
    return CompletionObjective(tokenizer.pad_token_id, keeps_logits, _label_tokens(tokenizer, task))


def _label_tokens(tokenizer: PreTrainedTokenizerBase, task: Task) -> torch.Tensor | None:
    """(labels,) the first token of each label's completion, as it stands in the samples."""
    if task.labels is None:
        return None
    assert task.completion, "check_task made sure"
    tokens: dict[int, str] = {}
    for word in task.labels:
        token = completion_ids(render(task.completion, {task.label_column: word}), tokenizer)[0]
        if token in tokens:
            raise ConfigError(
                "task.labels",
                f"{tokens[token]!r} and {word!r} both begin with the token {tokenizer.decode([token])!r}",
                "expected words, written by task.completion, that differ in their first token",
            )
        tokens[token] = word
    return torch.tensor(list(tokens))


def _summed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(B,) cross-entropy of (B, P, V) logits summed over each row's targets (B, P)."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets).sum(1)


def _largest_share(answers: Iterable[Any]) -> float:
    counts = Counter(answers)
    return max(counts.values()) / counts.total()
