"""Examples -> token ids, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from sparse_llm_ft.data.reading import Example
from sparse_llm_ft.errors import DataError

IGNORED = -100
"""Label of a position that has no part in the loss."""

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sample:
    """Token ids of prompt and completion; the completion ends with the end-of-sequence token.

    Attributes:
        label: in a classification by label words, the number of the right one.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    label: int | None = None

    @property
    def supervised(self) -> int:
        """Number of tokens with a loss: the completion's (its first is predicted from the prompt's last)."""
        return len(self.completion)


@dataclass(frozen=True)
class TextSample:
    """What an encoder sees: token ids of one text or a pair, with the tokenizer's special tokens, and its label.

    Attributes:
        type_ids: which text a token belongs to; None where the model does not ask.
    """

    ids: tuple[int, ...]
    type_ids: tuple[int, ...] | None
    label: int


@dataclass(frozen=True)
class EncodedSplit:
    """The samples of a split, in its order.

    Attributes:
        shortened: how many were too long and lost tokens.
    """

    samples: tuple[Sample, ...] | tuple[TextSample, ...]
    shortened: int


def encode_split(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedSplit:
    """Tokenise; a tokenizer with a chat template sees the prompt as the user's turn.

    A pair longer than `max_length` loses tokens from the middle of its prompt: both ends stay, where templates and
    instructions are. The completion is never cut.

    Raises:
        DataError: a completion that leaves no room for any of its prompt.
    """
    samples, shortened = [], 0
    for example in examples:
        prompt = _prompt_ids(example.prompt, tokenizer)
        completion = [*completion_ids(example.completion, tokenizer), tokenizer.eos_token_id]
        room = max_length - len(completion)
        if room < 1 or not prompt:
            raise DataError(
                example.source,
                example.line,
                f"a completion of {len(completion)} tokens and a prompt of {len(prompt)} do not fit into "
                f"task.max_length {max_length}",
            )
        if len(prompt) > room:
            prompt = [*prompt[: room - room // 2], *prompt[len(prompt) - room // 2 :]]
            shortened += 1
        samples.append(Sample(tuple(prompt), tuple(completion), example.label))
    return EncodedSplit(tuple(samples), shortened)


def encode_texts(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedSplit:
    """Tokenise for an encoder. What is longer than `max_length`, or than the tokenizer says its model can take, loses
    tokens from its end; of a pair, the longer text first.

    Args:
        examples: labelled ones.
    """
    samples, shortened = [], 0
    length = min(max_length, tokenizer.model_max_length)
    for example in examples:
        assert example.label is not None, "the task has labels"
        encoded = tokenizer(*example.texts, verbose=False)
        if len(encoded["input_ids"]) > length:
            encoded = tokenizer(*example.texts, truncation="longest_first", max_length=length)
            shortened += 1
        types = encoded.get("token_type_ids")
        samples.append(TextSample(tuple(encoded["input_ids"]), None if types is None else tuple(types), example.label))
    return EncodedSplit(tuple(samples), shortened)


def completion_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a completion, without the end-of-sequence token."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
    return list(tokenizer(prompt)["input_ids"])


def training_batch(samples: Sequence[Sample], pad_token_id: int) -> Batch:
    """Right-padded batch.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each (len(samples), longest) int64; labels of prompt and
        padding are `IGNORED`.
    """
    rows = [(*sample.prompt, *sample.completion) for sample in samples]
    width = max(map(len, rows))
    batch = {
        "input_ids": torch.full((len(rows), width), pad_token_id),
        "attention_mask": torch.zeros((len(rows), width), dtype=torch.long),
        "labels": torch.full((len(rows), width), IGNORED),
    }
    for i, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        batch["input_ids"][i, : len(row)] = torch.tensor(row)
        batch["attention_mask"][i, : len(row)] = 1
        batch["labels"][i, len(sample.prompt) : len(row)] = torch.tensor(sample.completion)
    return batch


def text_batch(samples: Sequence[TextSample], pad_token_id: int) -> Batch:
    """Right-padded batch for an encoder.

    Returns:
        ``input_ids``, ``attention_mask`` and, where the samples have type ids, ``token_type_ids``, each
        (len(samples), longest) int64; ``labels`` (len(samples),) int64.
    """
    shape = (len(samples), max(len(sample.ids) for sample in samples))
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.tensor([sample.label for sample in samples]),
    }
    for i, sample in enumerate(samples):
        batch["input_ids"][i, : len(sample.ids)] = torch.tensor(sample.ids)
        batch["attention_mask"][i, : len(sample.ids)] = 1
        if sample.type_ids is not None:
            types = batch.setdefault("token_type_ids", torch.zeros(shape, dtype=torch.long))
            types[i, : len(sample.ids)] = torch.tensor(sample.type_ids)
    return batch


def prompt_batch(samples: Sequence[Sample], pad_token_id: int) -> Batch:
    """Left-padded prompts for generation: ``input_ids`` and ``attention_mask``, each (len(samples), longest)."""
    width = max(len(sample.prompt) for sample in samples)
    ids = torch.full((len(samples), width), pad_token_id)
    mask = torch.zeros((len(samples), width), dtype=torch.long)
    for i, sample in enumerate(samples):
        ids[i, width - len(sample.prompt) :] = torch.tensor(sample.prompt)
        mask[i, width - len(sample.prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
