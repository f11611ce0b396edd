"""Labels chosen over all samples, accuracy, and Matthews' coefficient against its two textbook forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sparse_llm_ft.data.encoding import TextSample
from sparse_llm_ft.evaluation import ClassificationObjective, accuracy, choose_labels, matthews, mean_loss


def test_choices_come_in_order_with_the_mean_loss(process_group, encoder) -> None:
    samples = [TextSample((2, *range(4, 5 + i), 3), None, i % 3) for i in range(7)]
    objective = ClassificationObjective(0)
    expected = [int(encoder(torch.tensor([s.ids])).logits.argmax()) for s in samples]
    assert len(set(expected)) > 1
    encoder.train()
    for batch_size in (1, 3, 7):
        loss, choices = choose_labels(encoder, samples, objective, batch_size, 0, 1)
        assert choices == expected
        assert loss == pytest.approx(mean_loss(encoder, samples, objective, batch_size, 0, 1), rel=1e-6)
    assert encoder.training


def test_accuracy_is_in_percent() -> None:
    assert accuracy([1, 0, 2, 2], [1, 1, 2, 0]) == 50.0
    with pytest.raises(ValueError, match="0 choices and 0 labels"):
        accuracy([], [])
    with pytest.raises(ValueError, match="1 choices and 2 labels"):
        matthews([1], [1, 2])


def random_answers(classes: int, seed: int) -> tuple[list[int], list[int]]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=60)
    choices = np.where(generator.random(60) < 0.4, labels, generator.integers(classes, size=60))
    return choices.tolist(), labels.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_matthews_of_two_classes_is_his_formula(seed: int) -> None:
    choices, labels = random_answers(2, seed)
    pairs = list(zip(choices, labels, strict=True))
    tp, tn, fp, fn = (pairs.count(pair) for pair in ((1, 1), (0, 0), (1, 0), (0, 1)))
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(choices, labels) == pytest.approx(100 * expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_matthews_of_many_classes_is_the_correlation_of_indicators(seed: int) -> None:
    choices, labels = random_answers(4, seed)
    x, y = np.eye(4)[choices], np.eye(4)[labels]
    x, y = x - x.mean(0), y - y.mean(0)
    expected = (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())
    assert matthews(choices, labels) == pytest.approx(100 * expected, abs=1e-9)


def test_matthews_at_its_ends() -> None:
    assert matthews([0, 1, 1], [0, 1, 1]) == pytest.approx(100.0)
    assert matthews([1, 0, 0], [0, 1, 1]) == pytest.approx(-100.0)
    assert matthews([1, 1, 1], [0, 1, 1]) == 0.0, "all choices the same"
    assert matthews([0, 1, 1], [1, 1, 1]) == 0.0, "all labels the same"
