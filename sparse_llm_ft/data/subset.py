"""Stratified random subsets of the training set. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

SHOTS, LEAST = 16, 200
"""A default subset has 16 samples per class (Partial-LoRA, section 5), and scores 200 at least: with fewer an accuracy
has a standard error above 3.5 points."""


def default_size(
    labels: Sequence[int | None], fraction: float | None, least: int = LEAST
) -> tuple[float | None, int | None]:
    """``fraction`` and ``shots`` of `stratified` for a subset of no given size: the task's share of the training set,
    or `SHOTS` samples per class; at least `least` samples, if there are as many.

    Args:
        labels: as in `stratified`.
        fraction: the task's share, if it has one.
    """
    if fraction is not None:
        return min(1.0, max(fraction, least / max(len(labels), 1))), None
    return None, max(SHOTS, math.ceil(least / max(len(set(labels)), 1)))


def stratified(labels: Sequence[int | None], *, fraction: float | None, shots: int | None, seed: int) -> list[int]:
    """Sorted indices of a random subset, drawn from each class separately.

    Samples without label form one class. The draw from a class depends only on `seed`, the class and its members.

    Args:
        labels: (samples,), the class of each sample.
        fraction: share of each class, rounded up; in (0, 1].
        shots: samples per class, or all if the class has fewer. Give exactly one of `fraction` and `shots`.

    Raises:
        ValueError: there are no samples, not exactly one of `fraction` and `shots` is given, or it is out of range.
    """
    if not len(labels):
        raise ValueError("there are no samples to draw from")
    if (fraction is None) == (shots is None):
        raise ValueError(f"exactly one of fraction and shots is needed, not {fraction} and {shots}")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction}: expected more than 0 and at most 1")
    if shots is not None and shots < 1:
        raise ValueError(f"shots {shots}: expected 1 or more")
    members: dict[int | None, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    chosen: list[int] = []
    for label, indices in members.items():
        # 0.07 · 100 is a little more than 7 in floating point, and rounding that up would give 8.
        wanted = shots if shots is not None else math.ceil(round((fraction or 0) * len(indices), 9))
        # The spawn key keeps the draw independent of the sample order, which uses the same seed.
        sequence = np.random.SeedSequence(seed, spawn_key=(0 if label is None else label + 1,))
        order = np.random.default_rng(sequence).permutation(len(indices))
        chosen += [indices[place] for place in order[: max(1, wanted)]]
    return sorted(chosen)


def halves(labels: Sequence[int | None], indices: Sequence[int]) -> tuple[list[int], list[int]]:
    """Every other one of `indices` by class, and the rest. Of a class with an odd number the first half has one more.

    Args:
        labels: (samples,), the class of each sample.
        indices: samples of a random subset, ascending.
    """
    first: list[int] = []
    second: list[int] = []
    seen: Counter[int | None] = Counter()
    for index in indices:
        (second if seen[labels[index]] % 2 else first).append(index)
        seen[labels[index]] += 1
    return first, second
