"""Questions and their contexts -> windows of token ids, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from sparse_llm_ft.data.collate import Batch, collate_classification
from sparse_llm_ft.data.reading import Example
from sparse_llm_ft.data.samples import TextSample
from sparse_llm_ft.errors import ConfigError, DataError

Offsets = tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True)
class SpanSample:
    """A question with one window of its context.

    Attributes:
        type_ids: the text that each token belongs to; None if the model does not use them.
        start, end: first and last token of the answer; both are `null` if the question has no answer or the window
            does not contain all of it.
        null: position of the classification token, which means "no answer".
        example: index of the example.
        offsets: (tokens,), each context token's characters (first, last + 1); None for other tokens.
    """

    ids: tuple[int, ...]
    type_ids: tuple[int, ...] | None
    start: int
    end: int
    null: int
    example: int
    offsets: Offsets

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.ids)


@dataclass(frozen=True)
class SpanPreprocessor:
    """Splits a question's context into overlapping windows. The target is the first answer, as in BERT's training.

    Args:
        max_length: maximum tokens of a window, question and special tokens included. The tokenizer's own limit applies
            too.
        stride: tokens that neighbouring windows share; at most half of a window's context tokens.

    Raises:
        ConfigError: the tokenizer has no offsets or no classification token.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    stride: int = 128

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ConfigError(
                "model.name",
                f"{self.tokenizer.name_or_path!r} has a slow tokenizer, which does not know where its tokens are",
                "expected a model with a fast one (tokenizer.json)",
            )
        if self.tokenizer.cls_token_id is None:
            raise ConfigError(
                "model.name",
                f"{self.tokenizer.name_or_path!r} has a tokenizer without classification token, which stands for no "
                "answer",
                "expected an encoder",
            )

    def __call__(self, example: Example, index: int = 0) -> list[SpanSample]:
        """The windows of one example.

        Args:
            example: has `answers`; its `texts` are question and context.

        Raises:
            DataError: the question leaves no room for its context.
        """
        length = min(self.max_length, self.tokenizer.model_max_length)
        return _windows(index, example, self.tokenizer, length, self.stride)


def _windows(
    index: int, example: Example, tokenizer: PreTrainedTokenizerBase, length: int, stride: int
) -> list[SpanSample]:
    assert example.answers is not None, "the task is extractive"
    question, context = example.texts
    question_length = len(tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"])
    room = length - question_length - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 1:
        raise DataError(
            example.source,
            example.line,
            f"a question of {question_length} tokens leaves no room in task.max_length {length}",
        )
    encoded = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=length,
        stride=min(stride, room // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    types = encoded.get("token_type_ids")
    windows = []
    for i, ids in enumerate(encoded["input_ids"]):
        texts = encoded.sequence_ids(i)  # 0: question, 1: context, None: special tokens
        offsets = tuple(
            (begin, end) if text == 1 else None
            for text, (begin, end) in zip(texts, encoded["offset_mapping"][i], strict=True)
        )
        null = ids.index(tokenizer.cls_token_id)
        is_first, is_last = i == 0, i == len(encoded["input_ids"]) - 1
        start, end = _place(example.answers, offsets, is_first, is_last) or (null, null)
        type_ids = None if types is None else tuple(types[i])
        windows.append(SpanSample(tuple(ids), type_ids, start, end, null, index, offsets))
    return windows


def _place(
    answers: Sequence[tuple[str, int]], offsets: Offsets, is_first: bool, is_last: bool
) -> tuple[int, int] | None:
    """First and last token of the first answer; None if there is none or the window does not contain all of it.

    Args:
        is_first, is_last: whether the window has the context's beginning, and its end, where some tokenizers drop
            characters such as accents.
    """
    inside = [(position, *offset) for position, offset in enumerate(offsets) if offset is not None]
    if not answers or not inside:
        return None
    text, first = answers[0]
    first += len(text) - len(text.lstrip())  # some sets have spaces around their answers
    last = first + len(text.strip())
    if (first < inside[0][1] and not is_first) or (last > inside[-1][2] and not is_last):
        return None
    # All tokens that hold a part of it: bytes are tokens of some tokenizers, several of one character.
    held = [position for position, begin, end in inside if begin < last and end > first]
    return (held[0], held[-1]) if held else None


def collate_spans(samples: Sequence[SpanSample], pad_token_id: int) -> Batch:
    """Right-padded batch for an encoder.

    Returns:
        ``input_ids``, ``attention_mask`` and, if the samples have type ids, ``token_type_ids``, each
        (len(samples), longest) int64; ``start_positions`` and ``end_positions`` (len(samples),) int64.
    """
    batch = collate_classification([TextSample(sample.ids, sample.type_ids, 0) for sample in samples], pad_token_id)
    del batch["labels"]
    batch["start_positions"] = torch.tensor([sample.start for sample in samples])
    batch["end_positions"] = torch.tensor([sample.end for sample in samples])
    return batch
