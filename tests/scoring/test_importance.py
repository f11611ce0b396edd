"""Importances against a literal SVD; what is read off them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_llm_ft.errors import TrainingError
from sparse_llm_ft.scoring.importance import (
    Importance,
    check_finite,
    dense_weight,
    kept_count,
    overlap,
    preserve_flow,
    ranking,
    svd_importance,
)


def by_svd(weight: torch.Tensor) -> torch.Tensor:
    """Eq. 4-5 to the letter: W = P Λ Qᵀ, V = Q Λ, row norms of W V."""
    _, singular, qt = torch.linalg.svd(weight.double(), full_matrices=False)
    return (weight.double() @ (qt.T * singular)).norm(dim=1)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8), (4, 32), (32, 4), (1, 7), (7, 1), (1, 1)])
def test_one_gram_matrix_gives_what_the_svd_gives(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scores = svd_importance(weight)
    assert scores.rows.shape == (shape[0],) and scores.cols.shape == (shape[1],)
    assert scores.rows.dtype == scores.cols.dtype == torch.float32
    torch.testing.assert_close(scores.rows.double(), by_svd(weight), rtol=1e-5, atol=0)
    torch.testing.assert_close(scores.cols.double(), by_svd(weight.T), rtol=1e-5, atol=0)


def test_a_column_of_zeros_scores_zero_and_a_half_precision_is_widened() -> None:
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[:, 3] = 0
    scores = svd_importance(weight)
    assert scores.cols[3] == 0 and int((scores.cols == 0).sum()) == 1
    torch.testing.assert_close(scores.rows.double(), by_svd(weight.float()), rtol=1e-5, atol=0)


def test_dense_weight_is_what_the_layer_multiplies_with() -> None:
    from bitsandbytes.nn import Linear4bit

    plain = nn.Linear(64, 16, bias=False).bfloat16()
    assert torch.equal(dense_weight(plain), plain.weight.float())
    four_bit = Linear4bit(64, 16, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    four_bit.weight.data = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    four_bit = four_bit.to("cpu")
    assert four_bit.weight.quant_state is not None
    found = dense_weight(four_bit)
    assert found.shape == (16, 64) and found.dtype == torch.float32
    torch.testing.assert_close(found.T, four_bit(torch.eye(64)))


def test_ranking_prefers_the_lower_index_among_equals() -> None:
    assert ranking(torch.tensor([1.0, 3.0, 1.0, 3.0, 0.0])).tolist() == [1, 3, 0, 2, 4]


def test_scores_that_are_not_finite_are_refused_by_name() -> None:
    fine, broken = torch.ones(3), torch.tensor([1.0, float("nan")])
    check_finite({"a": Importance(fine, fine)})
    with pytest.raises(TrainingError, match=r"1 columns of module 'b'"):
        check_finite({"a": Importance(fine, fine), "b": Importance(fine, broken)})


def test_flow_preservation_adds_the_next_layers_scores_of_the_same_module() -> None:
    def scores(value: float, rows: int = 2) -> Importance:
        return Importance(torch.full((rows,), value), torch.full((3,), 10 * value))

    given = {
        "model.layers.0.q": scores(1),
        "model.layers.0.k": scores(2, rows=1),
        "model.layers.2.q": scores(4),
        "model.layers.2.k": scores(8, rows=2),  # another shape: rows stay, columns are added
        "model.layers.11.q": scores(16),
        "pooler": scores(32),
    }
    added = preserve_flow(given)
    assert {n: float(s.rows[0]) for n, s in added.items()} == dict(
        zip(given, [1 + 4, 2, 4 + 16, 8, 16, 32], strict=True)
    )
    assert {n: float(s.cols[0]) for n, s in added.items()} == dict(
        zip(given, [50, 100, 200, 80, 160, 320], strict=True)
    )


def test_overlap_is_the_share_of_common_top_indices() -> None:
    first = {"m": Importance(torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([1.0, 0.0]))}
    second = {"m": Importance(torch.tensor([4.0, 1.0, 3.0, 2.0]), torch.tensor([0.0, 1.0]))}
    assert overlap(first, second, {"m": (0.5, 0.5)}) == {"m": (0.5, 0.0)}
    assert overlap(first, second, {"m": (1.0, 0.0)}) == {"m": (1.0, 1.0)}


def test_a_ratio_of_whole_counts_gives_the_count_back() -> None:
    assert all(kept_count(kept / size, size) == kept for size in (1, 3, 7, 48, 4096) for kept in range(size + 1))
