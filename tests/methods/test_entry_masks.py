"""Masks of single entries: as plain values, drawn at random or by |gradient · value|, in plans and in layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel

from helpers.method_settings import TARGETS, config, start, state
from helpers.tiny_models import IDS, MODELS
from sparse_llm_ft.adapters import (
    add_adapters,
    count_parameters,
    count_stored_parameters,
    find_targets,
    save_peft_adapter,
    trained_parameters,
)
from sparse_llm_ft.adapters.masking import optimizer_masks
from sparse_llm_ft.adapters.targets import check_modules
from sparse_llm_ft.errors import ConfigError, TrainingError
from sparse_llm_ft.methods.masking import largest_entries, random_entries
from sparse_llm_ft.optim import EntryMask, PackedMask
from sparse_llm_ft.plan import AdapterPlan, IndexMask, ModuleAdapter, PlanError, uniform_plan
from sparse_llm_ft.plan_masks import EntryBits, EntryMasks
from sparse_llm_ft.scoring.scores import EntryScores


def plan_of_targets() -> AdapterPlan:
    return uniform_plan(TARGETS, 2, 6.0)


def scores_of(plan: AdapterPlan) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, adapter in plan.active.items():
        rows, columns = TARGETS[name]
        found[f"{name}.lora_A"] = torch.rand(adapter.r, columns, generator=generator)
        found[f"{name}.lora_B"] = torch.rand(rows, adapter.r, generator=generator)
    return found


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 8), (7, 9)])
def test_bits_hold_the_mask_that_they_were_made_of(shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).random(shape) < 0.4
    bits = EntryBits.of(mask)
    assert bits.size == mask.size and bits.kept == mask.sum() and np.array_equal(bits.flags(), mask.flatten())
    assert EntryBits.from_dict(bits.to_dict()) == bits
    dense = EntryMask(torch.from_numpy(mask))
    for begin in range(mask.size + 1):
        for end in range(begin, mask.size + 1):
            assert torch.equal(PackedMask(bits).indices(begin, end), dense.indices(begin, end))


@pytest.mark.parametrize(
    "data",
    [
        None,
        {"size": 9, "bits": "AA=="},
        {"size": 3, "bits": "/w=="},
        {"size": 8, "bits": "?"},
        {"size": True},
        {"size": -7, "bits": ""},
    ],
)
def test_bits_that_do_not_fit_are_refused(data: object) -> None:
    with pytest.raises(PlanError):
        EntryBits.from_dict(data)


def test_random_entries_have_the_share_and_depend_on_seed_and_name_alone() -> None:
    targets = {f"layers.{i}.q": (128, 96) for i in range(4)}
    plan = random_entries(uniform_plan(targets, 8, 8.0), targets, 0.3, 1)
    assert plan.masking == "optimizer"
    kept = [a.entries.a.kept + a.entries.b.kept for a in plan.active.values()]
    assert sum(kept) / (4 * 8 * 224) == pytest.approx(0.3, abs=0.02) and len(set(kept)) > 1
    one = {"layers.2.q": targets["layers.2.q"]}
    alone = random_entries(uniform_plan(one, 8, 8.0), one, 0.3, 1)
    assert alone.modules["layers.2.q"] == plan.modules["layers.2.q"]
    assert random_entries(uniform_plan(one, 8, 8.0), one, 0.3, 2).modules != alone.modules


def test_the_largest_entries_of_all_matrices_together_are_kept() -> None:
    plan = plan_of_targets()
    scores = scores_of(plan)
    masked = largest_entries(plan, scores, 0.25)
    every = torch.cat([score.flatten() for score in scores.values()])
    least = every.sort(descending=True).values[round(0.25 * len(every)) - 1]
    for name, mask in optimizer_masks(masked).items():
        assert torch.equal(mask.indices(0, scores[name].numel()), (scores[name].flatten() >= least).nonzero().flatten())
    assert count_parameters(masked, TARGETS) == round(0.25 * len(every))
    assert count_stored_parameters(masked, TARGETS) == len(every)


def test_scores_that_order_nothing_are_refused() -> None:
    plan = plan_of_targets()
    scores = scores_of(plan)
    scores["layers.1.attn.k.lora_B"][2, 1] = float("nan")
    with pytest.raises(TrainingError, match=r"entries of 'layers\.1\.attn\.k\.lora_B' are not finite numbers"):
        largest_entries(plan, scores, 0.25)
    with pytest.raises(TrainingError, match="all entries are 0 after method"):
        largest_entries(plan, {name: torch.zeros_like(score) for name, score in scores.items()}, 0.25)


def test_a_shared_pair_has_one_mask() -> None:
    targets = {f"layers.{i}.q": (8, 6) for i in range(3)}
    shared = uniform_plan(targets, 2, 4.0)
    shared = replace(shared, modules={name: replace(a, group="q-8x6") for name, a in shared.active.items()})
    masked = random_entries(shared, targets, 0.5, 0)
    assert len({a.entries for a in masked.active.values()}) == 1
    assert optimizer_masks(masked).keys() == {"shared.q-8x6.lora_A", "shared.q-8x6.lora_B"}


def test_a_plan_with_entries_survives_being_written_and_read() -> None:
    plan = random_entries(plan_of_targets(), TARGETS, 0.5, 0)
    assert AdapterPlan.from_dict(plan.to_dict(), TARGETS) == plan
    check_modules(plan, TARGETS)


def test_masks_that_contradict_the_plan_are_refused() -> None:
    entries = EntryMasks(EntryBits(16, b"\1\1"), EntryBits(16, b"\1\1"))
    with pytest.raises(PlanError, match="a mask of rows or columns beside one of entries"):
        ModuleAdapter(2, 4.0, rows=IndexMask(8, (1,)), entries=entries)
    with pytest.raises(PlanError, match="masking compact cannot leave single entries out"):
        AdapterPlan({"h.0.q": ModuleAdapter(2, 4.0, entries=entries)})
    wrong = AdapterPlan({"h.0.q": ModuleAdapter(2, 4.0, entries=entries)}, masking="optimizer")
    with pytest.raises(PlanError, match="masks of 16 and 16 entries where its A and B have 12 and 16"):
        check_modules(wrong, {"h.0.q": (8, 6)})


def test_masked_entries_are_zero_in_layers_and_in_the_exported_lora(tmp_path) -> None:
    llama = MODELS["llama"]
    targets = find_targets(llama.build(), "all-linear")
    plan = random_entries(uniform_plan(targets, 2, 4.0), targets, 0.5, 0)
    model = add_adapters(llama.build(), plan).eval()
    masks = optimizer_masks(plan)
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            kept = torch.zeros(parameter.numel(), dtype=torch.bool)
            kept[masks[name].indices(0, parameter.numel())] = True
            assert not parameter.flatten()[~kept].any()
            assert name.endswith(".lora_B") or parameter.flatten()[kept].all()
            parameter.copy_((torch.randn(parameter.numel()) * kept).view(parameter.shape))
        expected = model(input_ids=IDS).logits
    tensors = {name: p.detach() for name, p in trained_parameters(model).items()}
    save_peft_adapter(tmp_path, plan, tensors, "base", None)
    stock = PeftModel.from_pretrained(llama.build(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_random_masking_is_one_phase() -> None:
    chain, phase = start({"name": "random_masking", "ratio": 0.5})
    assert phase.name == "train" and phase.open_ended and all(a.entries for a in phase.plan.active.values())
    assert chain.next(phase, state(phase), None, TARGETS) is None


def test_a_share_that_keeps_no_entry_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.ratio: 1e-09 keeps none of 384 entries"):
        start({"name": "random_masking", "ratio": 1e-9})


def test_sparse_adapter_warms_up_scores_and_begins_anew_with_the_best_entries() -> None:
    chain, warmup = start({"name": "sparse_adapter", "sparsity": 0.75, "shots": 4, "warmup_steps": 3}, ("classifier",))
    assert (warmup.name, warmup.steps, warmup.is_warmup, warmup.subset.shots) == ("warmup", 3, True, 4)
    assert warmup.scoring.kind == "entries" and not any(a.entries for a in warmup.plan.active.values())
    scores = scores_of(warmup.plan)
    phase, after = chain.next(warmup, state(warmup, head=True), EntryScores(scores, 8), TARGETS)
    assert phase.open_ended and not phase.is_warmup and phase.subset is None and phase.scoring is None
    assert not after.tensors and not after.moments
    assert phase.plan == largest_entries(warmup.plan, scores, 0.25) and phase.plan.trained == ("classifier",)
    assert chain.next(phase, after, None, TARGETS) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_epochs": 3}, "method.head_epochs: has no effect under rule entries"),
        ({"rule": "rows_columns", "warmup_steps": 3}, "method.warmup_steps: has no effect under rule rows_columns"),
    ],
)
def test_a_setting_of_the_other_rule_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config({"name": "sparse_adapter"} | settings)


def test_masks_of_entries_compose_with_nothing() -> None:
    for method in ({"name": "random_masking", "ratio": 0.5}, {"name": "sparse_adapter"}):
        with pytest.raises(ConfigError, match="masks single entries"):
            config(["lora_drop", method])
    config(["lora_drop", {"name": "sparse_adapter", "rule": "rows_columns"}])
