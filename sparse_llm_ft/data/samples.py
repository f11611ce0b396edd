"""Tokenised rows: token ids, not yet tensors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain


@dataclass(frozen=True)
class Sample:
    """Token ids of prompt and completion; the completion ends with the end-of-sequence token.

    Attributes:
        label: the right label word's index in a classification, the score in a regression, None otherwise.
        shortened: whether the sample was truncated.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    label: int | float | None = None
    shortened: bool = False

    @property
    def supervised(self) -> int:
        """Number of tokens with a loss: the completion's (its first is predicted from the prompt's last)."""
        return len(self.completion_ids)

    @property
    def length(self) -> int:
        """Number of tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class TextSample:
    """Input of a classification head: token ids of one text or a pair, with special tokens.

    Attributes:
        type_ids: the text that each token belongs to; None if the model does not use them.
        label: the right label's index, or the score in a regression.
        shortened: whether the sample was truncated.
    """

    ids: tuple[int, ...]
    type_ids: tuple[int, ...] | None
    label: int | float
    shortened: bool = False

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.ids)


@dataclass(frozen=True)
class Pack:
    """Several samples in one sequence; none attends to another."""

    samples: tuple[Sample, ...]

    @property
    def supervised(self) -> int:
        """Number of tokens with a loss."""
        return sum(sample.supervised for sample in self.samples)

    @property
    def length(self) -> int:
        """Number of tokens of all samples."""
        return sum(sample.length for sample in self.samples)

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids of the sequence."""
        return tuple(chain.from_iterable((*sample.prompt_ids, *sample.completion_ids) for sample in self.samples))
