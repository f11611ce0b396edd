"""The encoded splits of a run."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from sparse_llm_ft.data.encoding import Sample, encode_split
from sparse_llm_ft.training.prepare import Prepared


@dataclass(frozen=True)
class Samples:
    """The encoded splits of a run; `validation` and `measured` may be empty."""

    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    measured: tuple[Sample, ...]
    shortened: int

    @classmethod
    def encode(cls, prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> Samples:
        """Tokenise all that `prepare` read."""
        length = prepared.config.task.max_length
        train, validation, measured = (
            encode_split(examples, tokenizer, length)
            for examples in (prepared.train, prepared.validation, prepared.measured)
        )
        return cls(train.samples, validation.samples, measured.samples, train.shortened)
