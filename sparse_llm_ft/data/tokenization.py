"""Examples -> token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from sparse_llm_ft.data.chat import ChatFormat
from sparse_llm_ft.data.reading import Example
from sparse_llm_ft.data.samples import Sample, TextSample
from sparse_llm_ft.errors import DataError, reason_of

Preprocessor = Callable[[Example], Any]
"""Example -> sample, or a list of windows."""


@dataclass(frozen=True)
class CausalLMPreprocessor:
    """For a decoder: prompt and completion in one sequence.

    A chat template formats the prompt as the user's turn, or a chat's turns as they are. Prompts longer than
    `prompt_length` are truncated in the middle, since templates and instructions are at the ends. The limit does not
    depend on the completion, whose length the model could otherwise learn. Only a completion too long for the rest of
    `max_length` shortens its prompt further. Completions are never truncated.

    Attributes:
        prompt_length: maximum tokens of the prompt; None means three quarters of `max_length`.
        chat: how the chat template is used; None takes it as it is.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    prompt_length: int | None = None
    chat: ChatFormat | None = None

    def __call__(self, example: Example) -> Sample:
        """Tokenise.

        Raises:
            DataError: the prompt is empty, or the completion leaves no room for it.
        """
        chat = ChatFormat(self.tokenizer) if self.chat is None else self.chat
        prompt = prompt_ids(example, chat)
        completion = completion_ids(example.completion, self.tokenizer, chat.end_token_id)
        usual = usual_prompt_length(self.max_length) if self.prompt_length is None else self.prompt_length
        room = min(usual, self.max_length - len(completion))
        if room < 1 or not prompt:
            raise DataError(
                example.source,
                example.line,
                f"a completion of {len(completion)} tokens and a prompt of {len(prompt)} do not fit into "
                f"task.max_length {self.max_length}",
            )
        return Sample(tuple(_without_middle(prompt, room)), tuple(completion), example.label, len(prompt) > room)


@dataclass(frozen=True)
class Seq2SeqPreprocessor:
    """For an encoder-decoder: the encoder reads the prompt, the decoder predicts the completion.

    Attributes:
        max_length: maximum tokens of each.
        prompt_length: maximum tokens of the prompt, if given. Longer prompts are truncated in the middle.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    prompt_length: int | None = None

    def __call__(self, example: Example) -> Sample:
        """Tokenise.

        Raises:
            DataError: the completion is longer than `max_length`, or the prompt is empty.
        """
        prompt = list(self.tokenizer(example.prompt, verbose=False)["input_ids"])
        completion = target_ids(example.completion, self.tokenizer)
        if len(completion) > self.max_length or not prompt:
            raise DataError(
                example.source,
                example.line,
                f"a completion of {len(completion)} tokens or a prompt of {len(prompt)} does not fit into "
                f"task.max_length {self.max_length}",
            )
        room = self.prompt_length or self.max_length
        return Sample(
            tuple(_without_middle(prompt, room)), tuple(completion), example.label, shortened=len(prompt) > room
        )


@dataclass(frozen=True)
class ClassificationPreprocessor:
    """For a classification head. Inputs longer than `max_length` or the tokenizer's own limit are truncated at the end,
    in a pair the longer text first.

    The tokenizer joins a pair by its separator; a decoder's, which has none, by a line break.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    limit: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", min(self.max_length, self.tokenizer.model_max_length))
        self.tokenizer.truncation_side = "right"  # overrides the tokenizer's own setting

    def __call__(self, example: Example) -> TextSample:
        """Tokenise a labelled example."""
        assert example.label is not None, "the task has labels"
        texts = example.texts
        if len(texts) > 1 and self.tokenizer.sep_token_id is None:
            texts = ("\n".join(texts),)
        encoded = self.tokenizer(*texts, verbose=False)
        shortened = len(encoded["input_ids"]) > self.limit
        if shortened:
            if len(texts) < len(example.texts):
                texts = (self._fitting(example.texts),)
            encoded = self.tokenizer(*texts, truncation="longest_first", max_length=self.limit, verbose=False)
        types = encoded.get("token_type_ids")
        return TextSample(
            tuple(encoded["input_ids"]), None if types is None else tuple(types), example.label, shortened
        )

    def _fitting(self, texts: Sequence[str]) -> str:
        """Texts joined by line breaks. As long as they do not fit, the longest one loses its last token."""
        kept = [len(self._plain(text)["input_ids"]) for text in texts]
        room = self.limit - self.tokenizer.num_special_tokens_to_add() - (len(texts) - 1)
        while sum(kept) > max(room, 0):
            kept[kept.index(max(kept))] -= 1
        return "\n".join(self._beginning(text, count) for text, count in zip(texts, kept, strict=True))

    def _beginning(self, text: str, tokens: int) -> str:
        """The text's part that its first tokens come from."""
        if not self.tokenizer.is_fast:
            return str(self.tokenizer.decode(self._plain(text)["input_ids"][:tokens]))
        places = self._plain(text, return_offsets_mapping=True)["offset_mapping"][:tokens]
        return text[: places[-1][1]] if places else ""

    def _plain(self, text: str, **options: bool) -> BatchEncoding:
        return self.tokenizer(text, add_special_tokens=False, verbose=False, **options)


def usual_prompt_length(max_length: int) -> int:
    """Default maximum of prompt tokens: three quarters of `max_length`."""
    return max_length - max_length // 4


def completion_ids(text: str, tokenizer: PreTrainedTokenizerBase, end: int | None = None) -> list[int]:
    """Token ids of a decoder's completion.

    Args:
        end: the last one; None is the end-of-sequence token.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id if end is None else end]


def target_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of an encoder-decoder's completion: target-text special tokens, end-of-sequence token last."""
    ids = list(tokenizer(text_target=text.strip(), verbose=False)["input_ids"])
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def prompt_ids(example: Example, chat: ChatFormat) -> list[int]:
    """Token ids of a decoder's prompt.

    Raises:
        DataError: a chat whose tokenizer has no chat template, or whose template rejects it.
    """
    tokenizer = chat.tokenizer
    turns = [{"role": "user", "content": example.prompt}]
    if example.messages is not None:
        turns = [dict(turn) for turn in example.messages]
        if not tokenizer.chat_template:
            raise DataError(
                example.source, example.line, "the row is a chat, but the model's tokenizer has no chat template"
            )
    if not tokenizer.chat_template:
        plain = list(tokenizer(example.prompt, verbose=False)["input_ids"])
        # Drop an end-of-sequence token: it would end the sequence before the completion.
        return plain[:-1] if len(plain) > 1 and plain[-1] == tokenizer.eos_token_id else plain
    try:
        return chat.prompt_ids(turns)
    except Exception as error:  # a template's code may raise anything
        reason = reason_of(error, 200)
        raise DataError(example.source, example.line, f"the chat template rejects it ({reason})") from error


def _without_middle(ids: list[int], length: int) -> list[int]:
    if len(ids) <= length:
        return ids
    return [*ids[: length - length // 2], *ids[len(ids) - length // 2 :]]
