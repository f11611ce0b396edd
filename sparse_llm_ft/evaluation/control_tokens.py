"""The tokens that steer a model and are no part of a text, left out of predictions and references alike."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

_TAG = re.compile(r"[^\w\s]\S*\w\S*[^\w\s]")
"""``<SQL>`` or ``[/INST]``; not a word, nor the whitespace that some tokenizers add as tokens."""

_NAMES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")


@dataclass(frozen=True)
class ControlTokens:
    """A tokenizer's control tokens: its beginning, end, padding, unknown, class, separator and mask, and what it puts
    around every text by itself (mBART's languages). Other special tokens, such as a user's tags, are text.

    Attributes:
        ids: their ids.
        texts: their texts, the longest first.
        tags: texts of other added tokens such as ``<SQL>``, the longest first.
    """

    tokenizer: PreTrainedTokenizerBase
    ids: frozenset[int]
    texts: tuple[str, ...]
    tags: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, further: Iterable[int | None] = ()) -> ControlTokens:
        """The tokenizer's control tokens.

        Args:
            further: ids that the model or its chat template puts around a text.
        """
        named = [getattr(tokenizer, f"{name}_token_id") for name in _NAMES]
        around = [*tokenizer("", verbose=False)["input_ids"], *tokenizer(text_target="", verbose=False)["input_ids"]]
        special = set(tokenizer.all_special_ids)
        ids = {*named, *further, *(token for token in around if token in special)}
        known = frozenset(token for token in ids if isinstance(token, int))
        texts = {str(text) for text in tokenizer.convert_ids_to_tokens(sorted(known)) if text}
        tags = {text for text in tokenizer.get_added_vocab() if _TAG.fullmatch(text)} - texts
        return cls(tokenizer, known, _longest_first(texts), _longest_first(tags))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids without control tokens and surrounding whitespace."""
        kept = [token for token in ids if token not in self.ids]
        # Some tokenizers would take the spaces out of "do n't ." here, which references keep.
        return self.strip(str(self.tokenizer.decode(kept, clean_up_tokenization_spaces=False)))

    def strip(self, text: str) -> str:
        """The text without what spells a control token, and without surrounding whitespace."""
        for token in self.texts:
            text = text.replace(token, "")
        return text.strip()

    def comparable(self, text: str) -> str:
        """The text with one space around each tag: tokenizers differ in the spaces beside added tokens."""
        if not any(tag in text for tag in self.tags):
            return text
        pattern = "|".join(map(re.escape, self.tags))
        return re.sub(rf"\s*({pattern})\s*", r" \1 ", text).replace("  ", " ").strip()


def _longest_first(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(texts, key=lambda text: (-len(text), text)))
