"""Kept rows and columns: shares, order, complements, and no dependence on other modules."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_llm_ft.errors import ConfigError, TrainingError
from sparse_llm_ft.scoring.importance import Importance
from sparse_llm_ft.scoring.masks import draw_masks

SELECTIONS = ["random", "targeted", "inverted", "stochastic"]


def scores(*shapes: tuple[int, int], seed: int = 0) -> dict[str, Importance]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"m{i}": Importance(torch.rand(rows, generator=generator), torch.rand(cols, generator=generator))
        for i, (rows, cols) in enumerate(shapes)
    }


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (64, 1), (16, 64)])
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.5, 1.0])
def test_at_least_one_is_kept_and_indices_ascend(selection: str, shape: tuple[int, int], p: float) -> None:
    masks = draw_masks({"m0": shape}, {"m0": (p, 1.0 - p)}, selection, scores(shape), seed=3)["m0"]
    for kept, size, ratio in zip(masks, shape, (p, 1.0 - p), strict=True):
        assert kept and list(kept) == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < size
        if ratio == 1.0 and selection != "inverted":
            assert kept == tuple(range(size))
        if ratio == 0.0 and selection != "inverted":
            assert len(kept) == 1


def test_random_keeps_a_share_of_p_and_every_index_as_often() -> None:
    counts = torch.zeros(200)
    for seed in range(200):
        rows, _ = draw_masks({"m": (200, 3)}, {"m": (0.3, 1.0)}, "random", seed=seed)["m"]
        assert 20 < len(rows) < 100  # 60, give or take six standard deviations
        counts[list(rows)] += 1
    assert float(counts.mean()) == pytest.approx(60, abs=3) and counts.min() > 20 and counts.max() < 100


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_module_does_not_depend_on_the_others_but_on_seed_and_name(selection: str) -> None:
    given = scores((64, 64), (64, 64))
    given["m1"] = given["m0"]
    shapes = dict.fromkeys(given, (64, 64))
    ratios = dict.fromkeys(given, (0.5, 0.5))
    both = draw_masks(shapes, ratios, selection, given, seed=1)
    alone = draw_masks({"m1": (64, 64)}, ratios, selection, given, seed=1)
    assert alone["m1"] == both["m1"] and draw_masks(shapes, ratios, selection, given, seed=1) == both
    if selection in ("random", "stochastic"):
        assert both["m0"] != both["m1"] and both["m0"][0] != both["m0"][1]
        assert draw_masks(shapes, ratios, selection, given, seed=2)["m0"] != both["m0"]


def test_targeted_keeps_the_top_and_inverted_the_rest() -> None:
    given = {"m": Importance(torch.tensor([5.0, 1.0, 5.0, 3.0, 5.0]), torch.tensor([2.0, 2.0]))}
    shapes = {"m": (5, 2)}
    assert draw_masks(shapes, {"m": (0.4, 0.5)}, "targeted", given)["m"] == ((0, 2), (0,))
    assert draw_masks(shapes, {"m": (0.4, 0.5)}, "inverted", given)["m"] == ((1, 3, 4), (1,))
    assert draw_masks(shapes, {"m": (1.0, 1.0)}, "inverted", given)["m"] == ((1,), (1,))  # the least important


def test_a_low_temperature_is_targeted_and_a_high_one_is_uniform() -> None:
    given = scores((40, 40))
    shapes, ratios = {"m0": (40, 40)}, {"m0": (0.25, 0.25)}
    targeted = draw_masks(shapes, ratios, "targeted", given)["m0"]
    assert draw_masks(shapes, ratios, "stochastic", given, temperature=1e-6)["m0"] == targeted
    top = int(given["m0"].rows.argmax())

    def share(temperature: float) -> float:
        drawn = [draw_masks(shapes, ratios, "stochastic", given, temperature, seed)["m0"][0] for seed in range(300)]
        assert all(len(rows) == 10 for rows in drawn)
        return sum(top in rows for rows in drawn) / 300

    assert share(1e6) == pytest.approx(0.25, abs=0.1) and share(0.5) > 0.6


def test_the_first_of_a_stochastic_draw_has_the_softmax_as_its_distribution() -> None:
    values = torch.tensor([0.0, 1.0, 3.0])
    given = {"m": Importance(values, torch.ones(1))}
    expected = (((values - values.mean()) / values.std(correction=0)) / 2.0).softmax(0)
    counts = torch.zeros(3)
    for seed in range(3000):
        (index,), _ = draw_masks({"m": (3, 1)}, {"m": (1 / 3, 1.0)}, "stochastic", given, 2.0, seed)["m"]
        counts[index] += 1
    torch.testing.assert_close(counts / 3000, expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("selection", ["targeted", "inverted", "stochastic"])
def test_equal_scores_are_no_trouble(selection: str) -> None:
    given = {"m": Importance(torch.zeros(6), torch.full((4,), 7.0))}
    rows, cols = draw_masks({"m": (6, 4)}, {"m": (0.5, 0.5)}, selection, given)["m"]
    assert len(rows) == 3 and len(cols) == 2


def test_what_cannot_be_drawn_is_refused_by_name() -> None:
    shapes, given = {"m0": (4, 4)}, scores((4, 4))
    for ratio in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match=r"method\.ratios: .*'m0'"):
            draw_masks(shapes, {"m0": (0.5, ratio)}, "random")
    with pytest.raises(ConfigError, match=r"no ratio for module 'm0'"):
        draw_masks(shapes, {}, "random")
    with pytest.raises(ConfigError, match=r"method\.temperature: 0"):
        draw_masks(shapes, {"m0": (0.5, 0.5)}, "stochastic", given, temperature=0)
    with pytest.raises(ValueError, match="importance of module 'm0'"):
        draw_masks(shapes, {"m0": (0.5, 0.5)}, "targeted")
    with pytest.raises(ValueError, match="4 scores on a side of size 5"):
        draw_masks({"m0": (4, 5)}, {"m0": (0.5, 0.5)}, "targeted", given)
    given["m0"].cols[2] = math.nan
    with pytest.raises(TrainingError, match="1 columns of module 'm0'"):
        draw_masks(shapes, {"m0": (0.5, 0.5)}, "targeted", given)
