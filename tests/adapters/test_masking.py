"""Masks in the optimizer: layers are whole with zeros at masked lines, a state holds the kept ones alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from helpers.tiny_models import IDS, MODELS
from sparse_llm_ft.adapters import (
    add_adapters,
    count_parameters,
    count_stored_parameters,
    find_targets,
    trained_parameters,
)
from sparse_llm_ft.adapters.build import change_plan
from sparse_llm_ft.adapters.masking import convert_moments, optimizer_masks, to_compact, to_full
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.plan import AdapterPlan, IndexMask, PlanError, group_name, module_kind, uniform_plan

LLAMA = MODELS["llama"]


def masked_plan(masking: str = "optimizer") -> AdapterPlan:
    """Masks on all modules; the two q_proj share."""
    targets = find_targets(LLAMA.build(), "all-linear")
    plan, modules = uniform_plan(targets, 2, 4), {}
    for name, adapter in plan.active.items():
        d_out, d_in = targets[name]
        group = group_name(module_kind(name), targets[name]) if name.endswith("q_proj") else None
        modules[name] = replace(adapter, rows=IndexMask(d_out, (0, 2)), cols=IndexMask(d_in, (1, 2, 3)), group=group)
    return replace(plan, modules=modules, masking=masking)


def values(plan: AdapterPlan) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {n: p.shape for n, p in trained_parameters(add_adapters(LLAMA.build(), plan)).items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def logits(plan: AdapterPlan, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)
    model = add_adapters(LLAMA.build(), plan).eval()
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(tensors[name])
        return model(IDS).logits


def test_one_state_gives_the_same_model_in_both_homes() -> None:
    compact, home = masked_plan("compact"), masked_plan()
    state = values(compact)
    whole = to_full(home, state)
    assert {n: t.shape for n, t in whole.items()} == {
        n: p.shape for n, p in trained_parameters(add_adapters(LLAMA.build(), home)).items()
    }
    torch.testing.assert_close(logits(home, whole), logits(compact, state))
    back = to_compact(home, whole)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    assert to_full(compact, state) == state  # nothing to do


@pytest.mark.parametrize("tuner", ["sparse_lora", "lora", "rslora", "dora", "adalora"])
def test_fresh_adapters_are_zero_at_masked_lines_and_kept_entries_as_without_masks(tuner: str) -> None:
    """Also after a change of plan, and for every tuner whose A and B they are."""
    options = {"target_r": 1, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 9} if tuner == "adalora" else {}
    plan = replace(masked_plan(), tuner=tuner, options=options)
    if tuner != "sparse_lora":
        plan = replace(plan, modules={n: a and replace(a, group=None) for n, a in plan.modules.items()})
    free = replace(plan, modules={n: a and replace(a, rows=None, cols=None) for n, a in plan.modules.items()})

    def fresh(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in trained_parameters(model).items()}

    one, other, base = LLAMA.build(), LLAMA.build(), add_adapters(LLAMA.build(), free)
    torch.manual_seed(3)
    expected = fresh(add_adapters(one, free))
    torch.manual_seed(3)
    masked = fresh(add_adapters(other, plan))
    torch.manual_seed(3)
    changed = fresh(change_plan(base, free, plan))
    masks = optimizer_masks(plan)
    assert {name.rpartition(".")[2] for name in masks} == {"lora_A", "lora_B"} | (
        {"lora_magnitude_vector"} if tuner == "dora" else set()
    )
    for name, value in masked.items():
        assert torch.equal(changed[name], value), name
        lines = masks.get(name)
        if lines is None or name.endswith("vector"):
            assert torch.equal(value, expected[name])
            continue
        kept = torch.tensor(lines.kept.indices)
        others = torch.tensor([i for i in range(lines.kept.size) if i not in lines.kept.indices])
        assert torch.equal(
            value.index_select(lines.dimension, kept), expected[name].index_select(lines.dimension, kept)
        )
        assert not value.index_select(lines.dimension, others).any()


def test_what_is_counted_and_what_is_stored() -> None:
    targets = find_targets(LLAMA.build(), "all-linear")
    compact, home = masked_plan("compact"), masked_plan()
    owners = home.matrix_owners()
    assert (
        count_parameters(home, targets)
        == count_parameters(compact, targets)
        == count_stored_parameters(compact, targets)
        == len(owners) * 2 * 5
    )
    assert count_stored_parameters(home, targets) == sum(2 * sum(targets[name]) for name in owners.values())
    assert home.layers == {name: replace(a, rows=None, cols=None) for name, a in home.active.items()}
    dora = replace(home, tuner="dora", modules={n: a and replace(a, group=None) for n, a in home.modules.items()})
    assert count_parameters(dora, targets) == len(targets) * (2 * 5 + 2)


def test_plans_remember_where_masks_live() -> None:
    plan = masked_plan()
    assert AdapterPlan.from_dict(plan.to_dict()) == plan
    with pytest.raises(PlanError, match="masking is 'gpu'; input should be 'compact' or 'optimizer'"):
        replace(plan, masking="gpu")


def test_moments_are_those_of_each_tensor_in_the_other_layout() -> None:
    plan = masked_plan()
    full = {name: {"exp_avg": t, "exp_avg_sq": t.abs()} for name, t in values(plan).items()}
    full["lm_head.weight"] = {}
    compact = convert_moments(full, lambda _, part: to_compact(plan, part))
    assert compact.keys() == full.keys() and compact["lm_head.weight"] == {}
    for name, entry in full.items():
        for kind, moment in entry.items():
            assert torch.equal(compact[name][kind], to_compact(plan, {name: moment})[name])
    back = convert_moments(compact, lambda kind, part: to_full(plan, part))
    assert all(
        torch.equal(back[n]["exp_avg"], to_full(plan, to_compact(plan, {n: e["exp_avg"]}))[n])
        for n, e in full.items()
        if e
    )


def test_saving_and_building_look_at_a_plans_masks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan has hundreds of modules: looking each up anew for each took seconds at every save."""
    plan, counts = masked_plan(), Counter[str]()

    def counted(name: str) -> property:
        own = getattr(AdapterPlan, name).fget

        def get(self: AdapterPlan) -> object:
            counts[name] += 1
            return own(self)

        return property(get)

    for name in ("active", "layers"):
        monkeypatch.setattr(AdapterPlan, name, counted(name))
    engine = Engine.__new__(Engine)
    engine._plan = plan
    tensors = values(plan)
    moments = {name: {"exp_avg": t, "exp_avg_sq": t.abs()} for name, t in tensors.items()}
    for name, result in (("values", tensors), ("moments", moments), ("optimizer_steps", {})):
        monkeypatch.setattr(Engine, name, lambda self, result=result: result)
    counts.clear()
    state = engine.state_dict()
    assert {name: tuple(t.shape) for name, t in state["tensors"].items()} == {
        name: tuple(entry["exp_avg"].shape) for name, entry in state["moments"].items()
    }
    assert counts["active"] < len(plan.modules)
    counts.clear()
    add_adapters(LLAMA.build(), plan)
    assert counts["layers"] == 0
