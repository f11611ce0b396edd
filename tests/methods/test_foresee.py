"""Phases foreseen before anything is measured, beside those that real scores give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers.method_settings import TARGETS, derivation, start, state
from sparse_llm_ft.adapters import count_parameters, count_stored_parameters
from sparse_llm_ft.scoring.scores import EntryScores

WEIGHS = {"keep": 3, "steps": 5}


def size(plan) -> tuple[int, int]:
    return count_parameters(plan, TARGETS), count_stored_parameters(plan, TARGETS)


@pytest.mark.parametrize("method", ["lora", "tied_lora", "dora", "vera", {"name": "random_masking", "ratio": 0.5}])
def test_a_method_of_one_phase_foresees_nothing(method) -> None:
    chain, first = start(method)
    assert chain.foresee(first, TARGETS) is None


def test_weight_lora_foresees_k_survivors_one_of_them_the_lowest_and_no_other_choice_is_larger() -> None:
    chain, first = start({"name": "weight_lora", **WEIGHS})
    foreseen, assumption = chain.foresee(first, TARGETS)
    names = list(foreseen.plan.active)
    assert names == ["layers.0.attn.q", "layers.0.mlp.up", "layers.1.mlp.up"]
    assert assumption.startswith("3 of 12 adapters survive")
    assert foreseen.plan.active["layers.0.attn.q"].omega == 1.0
    assert not any(a.train_omega for a in foreseen.plan.active.values())
    # Of all real outcomes none trains more than the largest three, of which the first may not be one.
    largest = sorted((a.matrices(TARGETS[n]) for n, a in first.plan.active.items()), reverse=True)[:3]
    assert sum(largest[:2]) < count_parameters(foreseen.plan, TARGETS) <= sum(largest)
    # Everything else is as after real scores.
    at_end = state(first)
    for i, name in enumerate(first.plan.active):
        at_end.tensors[f"{name}.lora_omega"] = torch.tensor([1.0 if i in (1, 4, 7) else 0.0])
    real, _ = chain.next(first, at_end, None, TARGETS)
    assert replace(foreseen, plan=real.plan) == real
    assert chain.foresee(foreseen, TARGETS) is None


def test_survivors_are_foreseen_where_a_budget_allows_them() -> None:
    """`CutRule.first` leaves the lowest adapters out."""
    chain, first = start({"name": "weight_lora", **WEIGHS})
    first = replace(first, cut=replace(first.cut, first=4))
    foreseen, _ = chain.foresee(first, TARGETS)
    assert list(foreseen.plan.active) == ["layers.1.attn.k", "layers.1.mlp.up", "layers.2.mlp.up"]


def test_weight_lora_plus_foresees_the_ranks_that_its_budget_gives() -> None:
    chain, first = start({"name": "weight_lora_plus", **WEIGHS})
    foreseen, _ = chain.foresee(first, TARGETS)
    at_end = state(first)
    for name in first.plan.active:
        at_end.tensors[f"{name}.lora_omega"] = torch.tensor([1.0 if name in foreseen.plan.active else 0.0])
    real, _ = chain.next(first, at_end, None, TARGETS)
    assert foreseen == real  # the same survivors have the same ranks, scalings and everything else
    budget = sum(a.matrices(TARGETS[n]) for n, a in first.plan.active.items())
    assert 0.9 * budget < count_parameters(foreseen.plan, TARGETS) <= budget


@pytest.mark.parametrize(
    "settings", [{}, {"share": False}, {"choose": "top"}, {"threshold": 0.5}, {"choose": "random"}]
)
def test_lora_drop_foresees_at_least_as_much_as_real_scores_leave(settings) -> None:
    chain, first = start({"name": "lora_drop", **settings})
    foreseen, assumption = chain.foresee(first, TARGETS)
    assert "as if all were equally important" in assumption
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        scores = dict(zip(TARGETS, (torch.rand(12, generator=generator) ** 4).tolist(), strict=True))
        real, _ = chain.next(first, state(first), scores, TARGETS)
        assert size(real.plan)[0] <= size(foreseen.plan)[0]
        assert replace(foreseen, plan=real.plan) == real


@pytest.mark.parametrize("masking", ["compact", "optimizer"])
def test_partial_lora_foresees_everything_kept_or_what_its_ratio_says(masking) -> None:
    chain, first = start({"name": "partial_lora", "masking": masking})
    foreseen, assumption = chain.foresee(first, TARGETS)
    assert size(foreseen.plan) == size(first.plan) and "1 of its rows and columns" in assumption
    real, _ = chain.next(first, state(first), derivation(), TARGETS)
    assert replace(foreseen, plan=real.plan) == real
    assert size(real.plan)[0] < size(foreseen.plan)[0]
    chain, first = start({"name": "partial_lora", "masking": masking, "ratio": 0.5})
    halved, assumption = chain.foresee(first, TARGETS)
    assert (
        size(halved.plan)[0] < 0.7 * size(first.plan)[0] and "0.5 of its rows and columns (method.ratio)" in assumption
    )


def test_sparse_adapter_foresees_its_sparsity() -> None:
    chain, first = start({"name": "sparse_adapter", "sparsity": 0.75})
    foreseen, assumption = chain.foresee(first, TARGETS)
    trained, stored = size(foreseen.plan)
    assert stored == size(first.plan)[1] and trained == pytest.approx(stored / 4, rel=0.15) and "0.25" in assumption
    generator = torch.Generator().manual_seed(0)
    scores = {
        f"{name}.{part}": torch.rand(shape, generator=generator)
        for name, (rows, columns) in TARGETS.items()
        for part, shape in (("lora_A", (2, columns)), ("lora_B", (rows, 2)))
    }
    real, _ = chain.next(first, state(first), EntryScores(scores, 8), TARGETS)
    assert replace(foreseen, plan=real.plan) == real


def test_a_chain_foresees_through_all_its_methods() -> None:
    """Masks that are derived after survivors are known: three phases, each with its own method."""
    chain, phase = start([{"name": "weight_lora", **WEIGHS}, {"name": "partial_lora", "ratio": 0.5}])
    found = [(phase.name, phase.method)]
    while (following := chain.foresee(phase, TARGETS)) is not None:
        phase = following[0]
        found.append((phase.name, phase.method))
    assert found == [("select", 0), ("derive", 1), ("train", 1)]
    assert len(phase.plan.active) == 3 and all(a.rows is not None for a in phase.plan.active.values())
