"""What a row is to a model: token ids, without tensors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain


@dataclass(frozen=True)
class Sample:
    """Token ids of prompt and completion; the completion ends with the end-of-sequence token.

    Attributes:
        label: in a classification by label words, the number of the right one; in a regression the score.
        shortened: whether it was too long and lost tokens.
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
    """What a model with a classification head sees: token ids of one text or a pair, with the tokenizer's special
    tokens, and its label.

    Attributes:
        type_ids: which text a token belongs to; None where the model does not ask.
        label: the number of the right one; in a regression the score.
        shortened: whether it was too long and lost tokens.
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
    """Several samples that lie in one sequence, none of which sees another."""

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
