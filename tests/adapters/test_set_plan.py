"""Changing the plan of a living model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model

from helpers.tiny_models import IDS, adapters_of, llama, logits, randomize, with_adapters
from sparse_llm_ft.adapters import SparseLoraConfig, SparseLoraLayer
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter, PlanError

Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
UP0, UP1 = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
ADAPTER = ModuleAdapter(r=2, lora_alpha=4.0, train_omega=True)
PLAN = AdapterPlan({Q0: ADAPTER, UP0: ADAPTER, Q1: ADAPTER})


@pytest.fixture
def base():
    return llama()


@pytest.fixture
def model(base):
    return with_adapters(base, plan=PLAN)


def values(model, module=""):
    named = adapters_of(model)
    return {name: value.detach().clone() for name, value in named.items() if name.startswith(module)}


def wrapped(model):
    return [name for name, module in model.named_modules() if isinstance(module, SparseLoraLayer)]


def test_a_removed_module_is_its_base_layer_again(base):
    layers = {name: base.get_submodule(name) for name in (Q0, UP0, Q1)}
    model = with_adapters(base, plan=PLAN)
    model.base_model.set_plan(AdapterPlan({Q0: None, UP0: ADAPTER, Q1: None}))
    assert base.get_submodule(Q0) is layers[Q0]
    assert base.get_submodule(Q1) is layers[Q1]
    assert wrapped(base) == [UP0]
    assert {name for name, _ in base.named_modules() if "lora_" in name and UP0 not in name} == set()
    assert not layers[Q0].weight.requires_grad
    with torch.no_grad():
        x = torch.randn(3, 32)
        assert torch.equal(base.get_submodule(Q0)(x), x @ layers[Q0].weight.T)


def test_a_plan_need_not_name_what_it_drops(model, base):
    model.base_model.set_plan(AdapterPlan({UP0: ADAPTER}))
    assert wrapped(base) == [UP0]


def test_an_identical_adapter_keeps_its_very_parameters(model):
    before, objects = values(model, UP0), adapters_of(model)
    assert len(before) == 3
    model.base_model.set_plan(AdapterPlan({Q0: None, UP0: replace(ADAPTER), Q1: replace(ADAPTER, r=3)}))
    after = adapters_of(model)
    for name, value in before.items():
        assert after[name] is objects[name]
        assert torch.equal(after[name], value)


@pytest.mark.parametrize(
    "changes", [{"r": 3}, {"lora_alpha": 5.0}, {"omega": 0.5}, {"train_omega": False}], ids=lambda c: next(iter(c))
)
def test_a_changed_adapter_is_built_anew(model, base, changes):
    adapter = replace(ADAPTER, **changes)
    before = values(model)
    model.base_model.set_plan(AdapterPlan(dict(PLAN.modules) | {Q1: adapter}))
    layer = base.get_submodule(Q1)
    assert layer.adapters["default"] == adapter
    assert layer.lora_A["default"].weight.shape == (adapter.r, 32)
    assert not layer.lora_B["default"].weight.any()
    assert ("default" in layer.lora_omega) is adapter.train_omega
    if adapter.train_omega:
        assert layer.lora_omega["default"].item() == adapter.omega
    assert all(parameter.requires_grad for parameter in adapters_of(model).values())
    after = values(model)
    assert all(torch.equal(after[name], value) for name, value in before.items() if not name.startswith(Q1))
    assert before[f"{Q1}.lora_B"].any()


def test_a_new_module_gets_a_fresh_trainable_adapter(model, base):
    expected = logits(model)
    model.base_model.set_plan(AdapterPlan(dict(PLAN.modules) | {UP1: ModuleAdapter(r=3, lora_alpha=6.0)}, 0.0))
    assert torch.equal(logits(model), expected)
    assert wrapped(base) == [Q0, UP0, Q1, UP1]
    randomize(model)
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 3 * 3 + 2
    assert all(parameter.grad.any() for parameter in adapters_of(model).values())
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in trained)


def test_the_logits_are_those_of_the_remaining_adapters(model):
    kept = values(model, Q1)
    model.base_model.set_plan(AdapterPlan({Q1: ADAPTER}))
    reference = llama()
    update = 2.0 * kept[f"{Q1}.lora_B"] @ kept[f"{Q1}.lora_A"]
    reference.get_submodule(Q1).weight.data += update
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=1e-5)


@pytest.mark.parametrize("trained", [True, False])
def test_the_new_plan_is_the_configs_and_is_saved_and_loaded(model, tmp_path, trained):
    plan = AdapterPlan({Q0: None, UP0: ADAPTER, Q1: replace(ADAPTER, r=3), UP1: ModuleAdapter(4, 8.0, omega=0.5)})
    model.base_model.set_plan(plan)
    assert model.peft_config["default"].plan == plan
    if trained:
        randomize(model, seed=7)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert loaded.peft_config["default"].plan == plan
    assert wrapped(loaded.base_model.model) == [UP0, Q1, UP1]
    assert torch.equal(logits(loaded), expected)


def test_plans_can_come_and_go(model, base):
    """Removing, bringing back and removing again leaves one wrapper per module and a model that still unloads."""
    for plan in (AdapterPlan({Q1: ADAPTER}), PLAN, AdapterPlan({UP1: ADAPTER}), PLAN):
        model.base_model.set_plan(plan)
        assert wrapped(base) == list(plan.active)
    randomize(model)
    expected = logits(model)
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)
    assert set(plain.state_dict()) == set(llama().state_dict())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            AdapterPlan({UP1: ADAPTER, "model.layers.2.mlp.up_proj": ADAPTER}),
            r"layers\.2\.mlp\.up_proj.*q_proj, k_proj",
        ),
        (AdapterPlan({UP1: ADAPTER, "model.layers.2.mlp.up_proj": None}), r"layers\.2\.mlp\.up_proj.*q_proj, k_proj"),
        (AdapterPlan({UP1: ADAPTER, "lm_head": ADAPTER}), "'lm_head'.*q_proj"),
        (AdapterPlan({UP1: ADAPTER, Q0: ModuleAdapter(33, 1.0)}), rf"{Q0}.*rank 33 .*\(32 × 32\)"),
    ],
    ids=["unknown", "unknown without adapter", "head", "rank"],
)
def test_a_plan_that_does_not_fit_changes_nothing(model, base, plan, message):
    before, expected = values(model), logits(model)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(PlanError, match=message):
        model.base_model.set_plan(plan)
    assert [name for name, _ in model.named_modules()] == names
    assert model.peft_config["default"].plan == PLAN
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    assert torch.equal(logits(model), expected)


def test_another_adapter_keeps_its_place(base):
    """Dropping the second adapter from a module leaves the first one there, active and unchanged."""
    model = with_adapters(base, plan=PLAN)
    expected = logits(model)
    model.add_adapter("other", SparseLoraConfig(plan=PLAN))
    model.base_model.set_plan(AdapterPlan({Q0: ADAPTER}), "other")
    assert wrapped(base) == [Q0, UP0, Q1]
    assert list(base.get_submodule(Q1).adapters) == ["default"]
    assert list(base.get_submodule(Q0).adapters) == ["default", "other"]
    assert model.peft_config["default"].plan == PLAN
    assert torch.equal(logits(model), expected)


def test_a_new_module_of_an_inactive_adapter_is_not_trained(model):
    model.add_adapter("other", SparseLoraConfig(plan=PLAN))
    model.base_model.set_plan(AdapterPlan({UP1: ADAPTER, Q0: replace(ADAPTER, r=3)}), "other")
    assert len(adapters_of(model, "other")) == 6
    assert not any(parameter.requires_grad for parameter in adapters_of(model, "other").values())
    assert all(parameter.requires_grad for parameter in adapters_of(model).values())


def test_names_are_right_on_a_model_wrapped_by_peft_and_after_a_change():
    model = get_peft_model(llama(), SparseLoraConfig(plan=PLAN))
    model.base_model.set_plan(AdapterPlan({UP1: ModuleAdapter(3, 6.0), Q0: ADAPTER}))
    shapes = {name: tuple(value.shape) for name, value in adapters_of(model).items()}
    assert shapes == {
        f"{Q0}.lora_A": (2, 32),
        f"{Q0}.lora_B": (32, 2),
        f"{Q0}.lora_omega": (1,),
        f"{UP1}.lora_A": (3, 32),
        f"{UP1}.lora_B": (96, 3),
    }
