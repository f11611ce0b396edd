"""The sizes of a run's samples, without tokenising them: from the cache, or at the settings' greatest length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.data.cache import CachedDataset, cache_folder
from sparse_llm_ft.data.dataset import SplitBuilder
from sparse_llm_ft.data.training_set import TrainingSet
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.io.atomic import is_whole

_LOOKED_AT = 256
"""Sequences whose positions with a loss are counted, for their mean."""


@dataclass(frozen=True)
class SampleSizes:
    """What a forecast needs to know of the training sequences.

    Attributes:
        longest: tokens of the longest one, for which memory is planned.
        mean, mean_square: of their tokens, and of the squares.
        supervised: mean number of positions with a loss.
        count: number of sequences; None if it is not known.
        equal: whether all are equally long, so that no micro-batch has padding.
        known: whether these are the run's own samples; else all are taken to be as long as allowed, every position
            with a loss.
    """

    longest: int
    mean: float
    mean_square: float
    supervised: float
    count: int | None
    known: bool
    equal: bool = False

    @classmethod
    def assumed(cls, length: int) -> SampleSizes:
        """Sequences of `length` tokens."""
        return cls(length, float(length), float(length) ** 2, float(length), None, False)


def sample_sizes(context: RunContext) -> SampleSizes:
    """Of the samples in the cache, if a command has tokenised them with these settings before; else assumed ones."""
    found = cached_training_set(context)
    if found is None:
        return SampleSizes.assumed(context.config.task.max_length)
    sequences = found.sequences()
    lengths = np.asarray(sequences.lengths, dtype=np.float64)
    some = range(0, len(sequences), max(1, len(sequences) // _LOOKED_AT))
    supervised = sum(context.objective.units(sequences[i]) for i in some) / len(some)
    return SampleSizes(
        int(lengths.max()),
        float(lengths.mean()),
        float((lengths**2).mean()),
        supervised,
        len(lengths),
        True,
        bool((lengths == lengths[0]).all()),
    )


def cached_training_set(context: RunContext) -> TrainingSet | None:
    """The tokenised training set; None if the cache does not have it or has a part of it, if no row could be used, if
    it is a stream, or if there are no data.
    """
    config = context.config
    if config.task.streaming:
        return None
    builder = SplitBuilder(config, context.task, context.tokenizer, context.task_mode)
    try:
        folder = cache_folder(builder.key("train"))
    except (UserError, OSError):  # no data here: a forecast does not need them
        return None
    if not is_whole(folder):
        return None  # a run would write it anew
    samples = CachedDataset(folder, builder.kind)
    return TrainingSet(samples, context.task, config.task) if len(samples) else None
