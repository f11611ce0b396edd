"""Labels chosen over all samples."""

from __future__ import annotations

import pytest
import torch

from sparse_llm_ft.data.tokenization import TextSample
from sparse_llm_ft.evaluation.loop import mean_loss, predict_labels
from sparse_llm_ft.objectives.classification import ClassificationObjective


def test_choices_come_in_order_with_the_mean_loss(process_group, encoder) -> None:
    samples = [TextSample((2, *range(4, 5 + i), 3), None, i % 3) for i in range(7)]
    objective = ClassificationObjective(0)
    expected = [int(encoder(torch.tensor([s.ids])).logits.argmax()) for s in samples]
    assert len(set(expected)) > 1
    encoder.train()
    for batch_size in (1, 3, 7):
        loss, choices = predict_labels(encoder, samples, objective, batch_size, 0, 1)
        assert choices == expected
        assert loss == pytest.approx(mean_loss(encoder, samples, objective, batch_size, 0, 1), rel=1e-6)
    assert encoder.training
