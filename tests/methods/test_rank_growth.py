"""Ranks grow within the budget, and growing changes no ΔW (relative 1e-6, scaling included)."""

from __future__ import annotations

import pytest
import torch

from sparse_llm_ft.methods.rank_growth import (
    expand_gaussian,
    expand_qr,
    grow_ranks,
    left_over,
    module_generator,
    pad_moments,
)

EXPANSIONS = {"gaussian": expand_gaussian, "qr": expand_qr}


@pytest.mark.parametrize("expansion", EXPANSIONS)
@pytest.mark.parametrize(("d_out", "d_in", "r", "rank"), [(6, 10, 2, 5), (10, 6, 3, 6), (4, 4, 1, 4), (7, 9, 3, 3)])
def test_the_product_is_unchanged(expansion: str, d_out: int, d_in: int, r: int, rank: int) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(r, d_in), torch.randn(d_out, r)
    new_a, new_b = EXPANSIONS[expansion](a, b, rank, module_generator(0, "m"))
    assert new_a.shape == (rank, d_in) and new_b.shape == (d_out, rank)
    scale = (b @ a).norm()
    assert (new_b @ new_a - b @ a).norm() / scale < 1e-6


def test_qr_gives_orthonormal_rows_and_keeps_the_row_space() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 12), torch.randn(5, 3)
    new_a, _ = expand_qr(a, b, 7, module_generator(0, "m"))
    assert torch.allclose(new_a @ new_a.T, torch.eye(7), atol=1e-6)
    projected = a @ new_a[:3].T @ new_a[:3]
    assert torch.allclose(projected, a, atol=1e-5)


def test_gaussian_keeps_the_old_block_and_has_the_variance_of_a_fresh_adapter() -> None:
    a, b = torch.ones(2, 300), torch.ones(4, 2)
    new_a, new_b = expand_gaussian(a, b, 52, module_generator(0, "m"))
    masked, _ = expand_gaussian(a, b, 52, module_generator(0, "m"), 4 * a.shape[1])  # A has a quarter of the columns
    assert torch.equal(2 * masked[len(a) :], new_a[len(a) :])
    assert torch.equal(new_a[:2], a) and torch.equal(new_b[:, :2], b) and not new_b[:, 2:].any()
    assert float(new_a[2:].var()) == pytest.approx(1 / (3 * 300), rel=0.05)


def test_new_rows_depend_on_seed_and_module_only() -> None:
    def rows(seed: int, module: str) -> torch.Tensor:
        return expand_gaussian(torch.ones(1, 4), torch.ones(3, 1), 3, module_generator(seed, module))[0]

    assert torch.equal(rows(1, "x"), rows(1, "x"))
    assert not torch.equal(rows(1, "x"), rows(1, "y"))
    assert not torch.equal(rows(1, "x"), rows(2, "x"))


def test_moments_of_the_old_block_stay_and_new_ones_are_zero() -> None:
    old = {"exp_avg": torch.arange(6.0).view(2, 3)}
    new = pad_moments(old, torch.Size((4, 3)))["exp_avg"]
    assert torch.equal(new[:2], old["exp_avg"]) and not new[2:].any()


def test_ranks_use_the_budget_and_never_more() -> None:
    shapes = {"q": (8, 8), "up": (24, 8), "k": (4, 8)}
    budget = sum(3 * sum(shape) for shape in shapes.values()) * 2
    grown = grow_ranks({"q": 3, "up": 3}, shapes, budget)
    used = sum(rank * sum(shapes[name]) for name, rank in grown.items())
    assert used <= budget
    assert all(used + sum(shapes[name]) > budget or rank == min(shapes[name]) for name, rank in grown.items())
    assert abs(grown["q"] - grown["up"]) <= 2


def test_a_rank_stops_at_the_smaller_side_and_its_share_goes_to_others() -> None:
    shapes = {"small": (2, 8), "large": (64, 64)}
    grown = grow_ranks({"small": 1, "large": 1}, shapes, 10 + 128 * 20 + 10)
    assert grown == {"small": 2, "large": 20}


def test_a_cap_stops_ranks_and_what_it_leaves_of_the_budget_is_counted() -> None:
    """left = budget - sum of r (d_out + d_in), where the cap and not a side or the budget stops a rank."""
    shapes = {"small": (4, 20), "large": (40, 60)}
    assert grow_ranks({"small": 2, "large": 2}, shapes, 5000, 16) == {"small": 4, "large": 16}
    assert left_over({"small": 4, "large": 16}, shapes, 5000, 16) == 5000 - 4 * 24 - 16 * 100
    # The budget stops both before the cap does, and the sides before the cap: nothing is left because of it.
    ranks = grow_ranks({"small": 2, "large": 2}, shapes, 700, 16)
    assert ranks == {"small": 4, "large": 6} and left_over(ranks, shapes, 700, 16) == 0
    ranks = grow_ranks({"small": 2, "large": 2}, shapes, 10**6, 64)
    assert ranks == {"small": 4, "large": 40} and left_over(ranks, shapes, 10**6, 64) == 0
    # A rank above the cap is never lowered.
    assert grow_ranks({"small": 2, "large": 20}, shapes, 5000, 16) == {"small": 4, "large": 20}


def test_everything_kept_means_nothing_grows() -> None:
    shapes = {"a": (4, 6), "b": (6, 4)}
    assert grow_ranks({"a": 2, "b": 2}, shapes, 40) == {"a": 2, "b": 2}


def test_a_budget_below_the_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="the ranks already need 20 parameters, more than the budget of 19"):
        grow_ranks({"a": 2}, {"a": (4, 6)}, 19)
