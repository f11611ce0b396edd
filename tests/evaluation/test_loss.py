"""The completion-only loss against a direct computation, and how samples are dealt to ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_llm_ft.data.encoding import Sample, training_batch
from sparse_llm_ft.evaluation import completion_loss, rank_batches, rouge, takes_logits_to_keep

SAMPLES = [Sample((1, 5, 6, 7), (8, 9, 2)), Sample((1, 4), (11, 2)), Sample((1, 12, 3), (5, 5, 5, 2))]


def by_hand(model: torch.nn.Module, sample: Sample) -> float:
    """-sum log p(completion token | all before it), without batch or padding."""
    ids = [*sample.prompt, *sample.completion]
    logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(logp[t - 1, ids[t]]) for t in range(len(sample.prompt), len(ids)))


@pytest.mark.parametrize("keeps_logits", [True, False])
def test_the_loss_is_the_sum_over_completion_tokens(model_folder: Path, keeps_logits: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    assert takes_logits_to_keep(model)
    with torch.no_grad():
        loss = completion_loss(model, training_batch(SAMPLES, 0), keeps_logits)
        assert float(loss) == pytest.approx(sum(by_hand(model, sample) for sample in SAMPLES), rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_every_sample_goes_to_one_rank_and_all_ranks_get_as_many_batches(world_size: int, count: int) -> None:
    dealt = [rank_batches(count, 2, rank, world_size) for rank in range(world_size)]
    assert sorted(i for batches in dealt for batch in batches for i in batch) == list(range(count))
    assert len({len(batches) for batches in dealt}) == 1


def test_rouge_takes_the_best_reference_and_is_in_percent() -> None:
    scores = rouge(["the red book"], [["a blue cake", "the red book"]])
    assert scores == {"rouge1": 100.0, "rouge2": 100.0, "rougeL": 100.0}
    assert rouge(["red book"], [["red cake"]])["rougeL"] == pytest.approx(50.0)
    with pytest.raises(ValueError, match="0 predictions"):
        rouge([], [])
