"""The joint derivation, all modules cut at one share of their importance, against weights that are really zeroed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from helpers.rank_threads import derive_on
from helpers.scored_models import RowObjective, bert, linears, llama, rows_for
from sparse_llm_ft.scoring import DerivationSettings, derive
from sparse_llm_ft.scoring.joint_search import STEPS, least_holding

OBJECTIVE = RowObjective()
SETTINGS = DerivationSettings(derivation="joint", micro_batch_size=10)


def zeroed_at(scores: torch.Tensor, k: int) -> list[int]:
    """By the definition: the longest run of least important indices whose scores sum to at most k / STEPS of all."""
    order = sorted(range(len(scores)), key=lambda i: (float(scores[i]), -i))
    whole, held, found = math.fsum(scores.tolist()), 0.0, []
    for index in order:
        held = math.fsum([*(float(scores[i]) for i in found), float(scores[index])])
        if k < STEPS and held > k / STEPS * whole * (1 + 1e-12):
            break
        found.append(index)
    return found


@torch.no_grad()
def passes(model: nn.Module, endings: tuple[str, ...], found, side: str, k: int, rows: list) -> bool:
    """Whether a copy with zeros in its weights keeps accuracy above the floor."""
    cut = copy.deepcopy(model)
    for name, module in linears(cut, *endings).items():
        chosen = zeroed_at(getattr(found.importance[name], side), k)
        module.weight[chosen if side == "rows" else (slice(None), chosen)] = 0
    correct = [int(OBJECTIVE.correct(m, OBJECTIVE.batch(rows)).sum()) for m in (model, cut)]
    return correct[1] >= SETTINGS.accuracy_floor * correct[0] - 1e-9


@pytest.mark.parametrize("build", [bert, lambda: llama(2)], ids=["bert", "llama"])
def test_it_ends_where_accuracy_crosses_the_floor(build) -> None:
    model = build()
    endings = ("query", "value", "1.output.dense", "pooler.dense") if build is bert else ("q_proj", "k_proj", "up_proj")
    modules = linears(model, *endings)
    rows = rows_for(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    found = derive(model, modules, rows, OBJECTIVE, SETTINGS)
    hook.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and not found.notes
    batches = -(-len(rows) // SETTINGS.micro_batch_size)
    assert len(calls) <= batches * (2 + 2 * int(math.log2(STEPS)))
    for place, side in enumerate(("rows", "cols")):
        kept = {name: ratios[place] for name, ratios in found.ratios.items()}
        scores = {name: getattr(found.importance[name], side) for name in modules}
        fitting = [
            k
            for k in range(1, STEPS + 1)
            if all(kept[n] == pytest.approx(1 - len(zeroed_at(s, k)) / len(s)) for n, s in scores.items())
        ]
        assert fitting, (side, kept)
        assert not passes(model, endings, found, side, fitting[-1], rows)
        assert fitting[0] == 1 or passes(model, endings, found, side, fitting[0] - 1, rows)
        assert all(0 < share <= 1 for share in kept.values())


def test_the_least_important_indices_that_hold_a_share() -> None:
    scores = torch.tensor([4.0, 1.0, 2.0, 3.0])  # cumulated from below: 0.1, 0.3, 0.6, 1
    held = {share: least_holding(scores, share).tolist() for share in (0.0, 0.09, 0.1, 0.3, 0.59, 0.6, 0.99, 1.0)}
    assert held == {
        **{0.0: [], 0.09: [], 0.1: [1], 0.3: [1, 2], 0.59: [1, 2]},
        **{0.6: [1, 2, 3], 0.99: [1, 2, 3], 1.0: [1, 2, 3, 0]},
    }
    assert least_holding(1e6 * scores, 0.3).tolist() == [1, 2]  # a module's scale says nothing
    assert least_holding(torch.tensor([0.0, 5.0, 0.0]), 0.0).tolist() == [2, 0]
    assert len(least_holding(torch.zeros(4), 0.5)) == 2
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        random = torch.rand(37, generator=generator)
        for k in (1, 64, 200, 255, STEPS):
            assert sorted(least_holding(random, k / STEPS).tolist()) == sorted(zeroed_at(random, k))


@pytest.mark.parametrize("lockstep", [False, True])
def test_ranks_decide_alike_and_share_the_passes(lockstep: bool) -> None:
    model = llama(2)
    rows = rows_for(model, count=40)  # four micro-batches
    endings = ("q_proj", "v_proj", "down_proj")
    alone, whole = derive_on(1, lockstep, model, endings, rows, SETTINGS)
    start = 2 * 4  # μ and loss, on every rank
    tests = whole[0].count("forward") - start
    for size in (2, 3):
        results, traces = derive_on(size, lockstep, model, endings, rows, SETTINGS)
        assert all(found.ratios == alone[0].ratios for found in results.values())
        counts = [trace.count("forward") - start for trace in traces.values()]
        if lockstep:  # the same layers, passes and gathers in the same order
            assert all(trace == traces[0] for trace in traces.values()) and counts[0] == tests
        else:
            assert sum(counts) == tests and max(counts) == tests // 4 * -(-4 // size)
