"""How samples are dealt to ranks, and the mean over them."""

from __future__ import annotations

import pytest

from sparse_llm_ft.data.tokenization import Sample
from sparse_llm_ft.evaluation.loop import mean_loss, rank_batches
from sparse_llm_ft.objectives.language_modeling import CompletionObjective

SAMPLES = [Sample((1, 5, 6, 7), (8, 9, 2)), Sample((1, 4), (11, 2)), Sample((1, 12, 3), (5, 5, 5, 2))]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_every_sample_goes_to_one_rank_and_all_ranks_get_as_many_batches(world_size: int, count: int) -> None:
    dealt = [rank_batches(count, 2, rank, world_size) for rank in range(world_size)]
    assert sorted(i for batches in dealt for batch in batches for i in batch) == list(range(count))
    assert len({len(batches) for batches in dealt}) == 1


def test_the_mean_is_over_units_whatever_the_batch(process_group, causal) -> None:
    objective = CompletionObjective(0, keeps_logits=True)
    alone = sum(float(objective.loss(causal, objective.batch([sample]))) for sample in SAMPLES) / 9
    causal.train()
    for batch_size in (1, 2, 3):
        assert mean_loss(causal, SAMPLES, objective, batch_size, 0, 1) == pytest.approx(alone, rel=1e-6)
    assert causal.training
