"""g, y and the choice of layers of LoRA-drop on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_llm_ft.errors import ConfigError, TrainingError
from sparse_llm_ft.scoring.lora_output import OutputScores, importance_by_type, select_layers


def test_g_is_the_mean_over_samples_of_the_squared_norm_without_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = OutputScores(["a", "b", "pooled"])
    expected = dict.fromkeys(("a", "b", "pooled"), 0.0)
    samples = 0
    for lengths in ([3, 5], [2, 4, 1], [6]):
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
        scores.begin_batch(mask)
        for name in ("a", "b"):
            output = torch.randn(len(lengths), max(lengths), 4, generator=generator)
            output[mask == 0] = math.nan  # what stands at padding must not matter
            scores.observer(name)(output)
            for one, length in zip(output, lengths, strict=True):
                expected[name] += float(one[:length].double().norm() ** 2)
        pooled = torch.randn(len(lengths), 4, generator=generator)
        scores.observer("pooled")(pooled)
        expected["pooled"] += float(pooled.double().norm() ** 2)
        samples += len(lengths)
    found = scores.totals()
    assert list(found) == ["a", "b", "pooled"]
    for name, value in found.items():
        assert value == pytest.approx(expected[name] / samples, rel=1e-6)


def test_ranks_add_up_and_a_batch_of_padding_is_no_sample() -> None:
    def one_rank(value: float, mask: torch.Tensor) -> OutputScores:
        scores = OutputScores(["a", "unseen"])
        scores.begin_batch(mask)
        scores.observer("a")(torch.full((*mask.shape, 3), value))
        return scores

    ranks = [one_rank(2.0, torch.ones(2, 4)), one_rank(1.0, torch.ones(1, 2)), one_rank(9.0, torch.zeros(1, 5))]
    given: list[torch.Tensor] = []
    for scores in ranks:
        with_others = given.append  # what each rank gives to the sum
        try:
            scores.totals(lambda tensor, keep=with_others: (keep(tensor), tensor)[1])
        except TrainingError:
            assert scores is ranks[2]  # alone it has seen no sample
    found = ranks[2].totals(lambda _: sum(given))
    assert found == {"a": pytest.approx((2 * 4 * 3 * 4.0 + 2 * 3 * 1.0) / 3), "unseen": 0.0}


def test_small_terms_are_not_lost_beside_large_ones() -> None:
    scores = OutputScores(["a"])
    for value in [1e4, *[1.0] * 1000]:
        scores.begin_batch(torch.ones(1, 1))
        scores.observer("a")(torch.full((1, 1, 1), value, dtype=torch.bfloat16))
    exact = float(torch.tensor(1e4).bfloat16()) ** 2 + 1000
    assert scores.totals()["a"] * 1001 == pytest.approx(exact, rel=1e-12)


def test_wrong_use_is_said() -> None:
    scores = OutputScores(["a"])
    with pytest.raises(KeyError, match="'b' is not observed"):
        scores.observer("b")
    with pytest.raises(RuntimeError, match="begin_batch"):
        scores.observer("a")(torch.ones(1, 2, 3))
    with pytest.raises(TrainingError, match="no sample"):
        scores.totals()
    scores.begin_batch(torch.ones(2, 3))
    for shape in ((2, 4, 5), (3, 3, 5), (3, 5)):
        with pytest.raises(ConfigError, match=rf"adapter\.target_modules: the output of module 'a' is \({shape[0]}, "):
            scores.observer("a")(torch.ones(shape))
    scores.observer("a")(torch.full((2, 3, 1), math.inf))
    with pytest.raises(TrainingError, match="module 'a'"):
        scores.totals()


def test_what_a_layer_computes_of_relative_positions_belongs_to_no_sample() -> None:
    """DeBERTa's query and key layers project embeddings of relative positions too, once for all samples."""
    scores = OutputScores(["query", "position"])
    for length in (3, 2):
        scores.begin_batch(torch.ones(2, length))
        scores.observer("query")(torch.ones(2, length, 4))
        scores.observer("query")(torch.full((1, 3, 4), 100.0))  # as long as a sample, once
        scores.observer("query")(torch.full((1, 16, 4), 100.0))
    assert scores.totals()["query"] == 2 * 4 * (3 + 2) / 4
    scores.observer("position")(torch.ones(1, 16, 4))
    with pytest.raises(ConfigError, match="module 'position' is one for all samples"):
        scores.totals()


def kind(name: str) -> str:
    return name.rpartition(".")[2]


def test_shares_are_within_a_type() -> None:
    g = {"0.q": 1.0, "0.v": 10.0, "1.q": 3.0, "1.v": 10.0, "0.z": 0.0, "1.z": 0.0, "2.z": 0.0, "only": 5.0}
    assert importance_by_type(g, kind) == {
        "0.q": 0.25,
        "0.v": 0.5,
        "1.q": 0.75,
        "1.v": 0.5,
        **dict.fromkeys(("0.z", "1.z", "2.z"), 1 / 3),
        "only": 1.0,
    }
    with pytest.raises(TrainingError, match=r"'1\.q'"):
        importance_by_type({**g, "1.q": math.nan}, kind)


def test_the_most_important_are_kept_in_the_models_order() -> None:
    y = {"0": 0.1, "1": 0.4, "2": 0.05, "3": 0.3, "4": 0.15}
    assert select_layers(y, 0.4) == ["1"]
    assert select_layers(y, 0.7) == ["1", "3"]
    assert select_layers(y, 0.71) == ["1", "3", "4"]
    assert select_layers(y, 0.9) == ["1", "3", "4", "0"] or select_layers(y, 0.9) == ["0", "1", "3", "4"]
    assert select_layers(y, 0.9) == sorted(select_layers(y, 0.9))
    assert select_layers(y, 1.0) == list(y)
    assert select_layers(y, 1e-12) == ["1"]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 12, 32, 49])
def test_equal_shares_keep_the_earliest_and_a_whole_number(count: int) -> None:
    y = importance_by_type({str(i): 0.3 for i in range(count)}, lambda _: "q")
    for kept in range(1, count + 1):
        assert select_layers(y, kept / count) == [str(i) for i in range(kept)]
    zero = importance_by_type({str(i): 0.0 for i in range(count)}, lambda _: "q")
    assert select_layers(zero, 1.0) == list(zero)


def test_a_threshold_of_one_keeps_every_share_above_zero() -> None:
    y = {"0": 1e-30, "1": 1.0, "2": 0.0, "3": 1e-300}
    assert select_layers(y, 1.0) == ["0", "1", "3"]
    assert select_layers({"0": 0.0, "1": 1.0}, 1.0) == ["1"]


def test_thresholds_and_shares_that_mean_nothing() -> None:
    for threshold in (0.0, -1.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="threshold"):
            select_layers({"a": 1.0}, threshold)
    with pytest.raises(TrainingError, match="'b'"):
        select_layers({"a": 1.0, "b": math.nan}, 0.9)
