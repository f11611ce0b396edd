"""A stratified part of the training set: which class gives how much, and that the draw can be repeated."""

from __future__ import annotations

from collections import Counter

import pytest

from sparse_llm_ft.data.subset import default_size, halves, stratified
from sparse_llm_ft.data.tasks import TASKS

LABELS = [0] * 50 + [1] * 30 + [2] * 3


def counts(indices: list[int], labels: list[int | None] = LABELS) -> Counter:
    return Counter(labels[i] for i in indices)


@pytest.mark.parametrize("seed", range(5))
def test_shots_of_each_class_and_all_of_a_small_one(seed: int) -> None:
    chosen = stratified(LABELS, fraction=None, shots=4, seed=seed)
    assert chosen == sorted(set(chosen))
    assert counts(chosen) == {0: 4, 1: 4, 2: 3}


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.1, (5, 3, 1)), (0.07, (4, 3, 1)), (0.001, (1, 1, 1)), (1.0, (50, 30, 3))]
)
def test_a_fraction_of_each_class_rounded_up(fraction: float, expected: tuple[int, ...]) -> None:
    chosen = stratified(LABELS, fraction=fraction, shots=None, seed=0)
    assert counts(chosen) == dict(enumerate(expected))


def test_a_fraction_that_is_whole_is_not_rounded_up_for_its_floating_point() -> None:
    assert 0.07 * 100 > 7
    assert len(stratified([None] * 100, fraction=0.07, shots=None, seed=0)) == 7


def test_the_draw_is_repeatable_and_depends_on_the_seed() -> None:
    draws = [stratified(LABELS, fraction=0.2, shots=None, seed=seed) for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


def test_a_class_is_drawn_by_itself_in_any_order_of_the_others() -> None:
    """Class 1 loses class 2 behind it and class 0 becomes rare: of class 1 the same members are drawn."""
    chosen = stratified(LABELS, fraction=None, shots=5, seed=1)
    fewer = stratified(LABELS[48:80], fraction=None, shots=5, seed=1)
    assert [i - 48 for i in chosen if LABELS[i] == 1] == [i for i in fewer if LABELS[48 + i] == 1]


def test_without_labels_it_is_a_plain_draw() -> None:
    assert len(stratified([None] * 20, fraction=0.25, shots=None, seed=0)) == 5
    assert len(stratified([None] * 20, fraction=None, shots=6, seed=0)) == 6
    every = Counter(i for seed in range(300) for i in stratified([None] * 20, fraction=None, shots=5, seed=seed))
    assert len(every) == 20 and max(every.values()) < 2 * min(every.values()), "some samples are hardly ever drawn"


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        ([], {"fraction": None, "shots": 2}, "there are no samples to draw from"),
        ([0], {"fraction": None, "shots": None}, "exactly one of fraction and shots is needed, not None and None"),
        ([0], {"fraction": 0.5, "shots": 2}, "exactly one of fraction and shots is needed, not 0.5 and 2"),
        ([0], {"fraction": 0.0, "shots": None}, "fraction 0.0: expected more than 0 and at most 1"),
        ([0], {"fraction": 1.5, "shots": None}, "fraction 1.5: expected more than 0 and at most 1"),
        ([0], {"fraction": None, "shots": 0}, "shots 0: expected 1 or more"),
    ],
)
def test_what_cannot_be_drawn_is_refused(labels: list, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stratified(labels, **settings, seed=0)


def test_a_subset_of_no_given_size_is_the_tasks_share_or_shots_and_never_a_handful() -> None:
    """Partial-LoRA, section 5: 2 % or 5 % of GLUE, 16 samples per class elsewhere; 200 samples at least are ours."""
    labels = [i % 2 for i in range(67_349)]
    assert default_size(labels, 0.05) == (0.05, None)  # SST-2
    small = [i % 2 for i in range(3668)]  # MRPC, whose 2 % are 73
    fraction, shots = default_size(small, 0.02)
    assert shots is None and len(stratified(small, fraction=fraction, shots=None, seed=0)) == 200
    assert default_size([None] * 5000, None) == (None, 200)  # a task without classes
    assert default_size(labels, None) == (None, 100)
    assert default_size(labels, None, least=400) == (None, 200) and default_size(small, 0.02, 400)[0] == 400 / 3668
    assert default_size([i % 20 for i in range(5000)], None) == (None, 16)
    fraction, shots = default_size([0, 1, 0], 0.02)
    assert stratified([0, 1, 0], fraction=fraction, shots=shots, seed=0) == [0, 1, 2]
    for glue in (task for name, task in TASKS.items() if name.startswith("glue/")):
        assert glue.few_shot_fraction == (0.05 if glue.name[5:] in ("sst2", "qqp", "mnli", "qnli") else 0.02)


@pytest.mark.parametrize("seed", range(3))
def test_halves_share_every_class_and_no_sample(seed: int) -> None:
    chosen = stratified(LABELS, fraction=None, shots=7, seed=seed)
    first, second = halves(LABELS, chosen)
    assert sorted(first + second) == chosen and not set(first) & set(second)
    assert counts(first) == {0: 4, 1: 4, 2: 2} and counts(second) == {0: 3, 1: 3, 2: 1}
    assert halves(LABELS, chosen) == (first, second)
    assert halves([None] * 3, [0, 2]) == ([0], [2])
