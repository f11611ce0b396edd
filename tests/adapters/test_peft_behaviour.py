"""What PEFT promises of any tuner, on seven architectures."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, default_data_collator

from helpers.tiny_models import IDS, MODELS, adapters_of, llama, logits, randomize, with_adapters
from sparse_llm_ft.adapters import SparseLoraConfig, SparseLoraLayer, find_targets, is_omega
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter, PlanError
from sparse_llm_ft.scoring.importance import dense_weight


@pytest.fixture(params=list(MODELS))
def tiny(request):
    return MODELS[request.param]


def wrapped_modules(model):
    return {name for name, module in model.named_modules() if isinstance(module, SparseLoraLayer)}


def tensors_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_all_linear_is_every_linear_layer_but_the_head(tiny):
    model = tiny.build()
    found = find_targets(model, "all-linear")
    assert set(found) == tiny.targets
    order = [name for name, _ in model.named_modules()]
    assert list(found) == sorted(found, key=order.index)
    assert all(dense_weight(model.get_submodule(name)).shape == shape for name, shape in found.items())
    wrapped = get_peft_model(model, SparseLoraConfig(r=4, task_type=tiny.task_type))
    assert wrapped_modules(wrapped.base_model.model) == tiny.targets


def test_fresh_adapters_leave_the_logits_and_one_step_changes_them(tiny):
    expected = logits(tiny.build())
    model = get_peft_model(tiny.build(), SparseLoraConfig(r=4, train_omega=True, task_type=tiny.task_type))
    assert torch.equal(logits(model), expected)
    base = {name: value for name, value in tensors_of(model).items() if ".base_layer." in name}
    assert len(base) >= len(tiny.targets)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapters = adapters_of(model)
    assert {id(parameter) for parameter in adapters.values()} <= {id(parameter) for parameter in trained}
    assert sum("lora_" in name for name in adapters) == 3 * len(tiny.targets)
    optimizer = torch.optim.SGD(adapters.values(), lr=1.0)
    model(input_ids=IDS).logits.square().mean().backward()
    optimizer.step()
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in base.items())


def test_a_saved_adapter_loads_with_the_same_logits(tiny, tmp_path):
    model = with_adapters(tiny.build(), r=4, train_omega=True, lora_dropout=0.1, task_type=tiny.task_type)
    for name, parameter in adapters_of(model).items():
        if is_omega(name):
            parameter.data.fill_(0.5)
    expected = logits(model)
    assert not torch.allclose(expected, logits(tiny.build()), atol=1e-2)
    model.save_pretrained(tmp_path)
    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(tiny.build(), tmp_path, is_trainable=trainable)
        assert torch.equal(logits(loaded), expected)
        assert {p.requires_grad for p in adapters_of(loaded).values()} == {trainable}
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert AdapterPlan.from_dict(saved["plan"]) == model.peft_config["default"].plan


def test_disabling_gives_the_base(tiny):
    expected = logits(tiny.build())
    model = with_adapters(tiny.build(), r=4, task_type=tiny.task_type)
    adapted = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), adapted)
    assert not torch.allclose(adapted, expected, atol=1e-2)


def test_merge_and_unload_gives_a_plain_model_with_the_same_logits(tiny):
    model = with_adapters(tiny.build(), r=4, train_omega=True, task_type=tiny.task_type)
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is tiny.kind
    assert not wrapped_modules(merged)
    assert set(merged.state_dict()) == set(tiny.build().state_dict())
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


def test_unload_gives_the_base(tiny):
    base = tiny.build()
    expected, layers = logits(base), {name: base.get_submodule(name) for name in tiny.targets}
    plain = with_adapters(base, r=4, task_type=tiny.task_type).unload()
    assert not wrapped_modules(plain)
    assert all(plain.get_submodule(name) is layer for name, layer in layers.items())
    assert torch.equal(logits(plain), expected)


def test_merge_and_unmerge_restore_weights_and_logits(tiny):
    model = with_adapters(tiny.build(), r=4, task_type=tiny.task_type)
    expected, before = logits(model), tensors_of(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    name = next(name for name in before if name.endswith(".base_layer.weight"))
    assert not torch.allclose(model.state_dict()[name], before[name], atol=1e-2)
    model.unmerge_adapter()
    torch.testing.assert_close(tensors_of(model), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_a_plan_alone_decides():
    """`plan` wins over r, lora_alpha, lora_dropout and target_modules of the same config."""
    plan = AdapterPlan(
        {"model.layers.1.mlp.up_proj": ModuleAdapter(r=3, lora_alpha=6.0), "model.layers.0.mlp.up_proj": None}, 0.25
    )
    model = get_peft_model(llama(), SparseLoraConfig(plan=plan, r=8, target_modules=["q_proj"], train_omega=True))
    assert wrapped_modules(model.base_model.model) == {"model.layers.1.mlp.up_proj"}
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    assert layer.adapters == {"default": ModuleAdapter(r=3, lora_alpha=6.0)}
    assert layer.lora_A["default"].weight.shape == (3, 32)
    assert layer.lora_dropout["default"].p == 0.25
    assert SparseLoraConfig(plan=plan.to_dict()).plan == plan


@pytest.mark.parametrize(
    ("name", "r", "found"),
    [("model.layers.7.mlp.up_proj", 4, "q_proj, k_proj"), ("lm_head", 4, "q_proj"), ("model.norm", 4, "q_proj")],
)
def test_a_plan_for_another_model_is_refused_before_anything_changes(name, r, found):
    base = llama()
    plan = AdapterPlan({"model.layers.0.mlp.up_proj": ModuleAdapter(4, 8.0), name: ModuleAdapter(r, 8.0)})
    with pytest.raises(PlanError, match=rf"{name}.*{found}"):
        get_peft_model(base, SparseLoraConfig(plan=plan))
    assert not wrapped_modules(base)


def test_modules_to_save_are_trained_and_saved_whole(tmp_path):
    model = with_adapters(llama(), r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert head.requires_grad
    head.data.mul_(-1.5)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)
    assert not torch.allclose(logits(with_adapters(llama(), r=2, target_modules=["q_proj"])), expected, atol=1e-2)


def test_two_adapters_are_trained_one_at_a_time_and_add_up():
    expected_base = logits(llama())
    model = with_adapters(llama(), r=2, target_modules=["q_proj", "v_proj"])
    first = logits(model)
    model.add_adapter(
        "other", SparseLoraConfig(r=3, lora_alpha=9.0, train_omega=True, target_modules=["v_proj", "up_proj"])
    )
    randomize(model, seed=2, adapter_name="other")
    assert torch.equal(logits(model), first)
    assert not any(parameter.requires_grad for parameter in adapters_of(model, "other").values())
    assert all(parameter.requires_grad for parameter in adapters_of(model).values())

    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(second, first, atol=1e-2)
    assert all(parameter.requires_grad for parameter in adapters_of(model, "other").values())
    assert not any(parameter.requires_grad for parameter in adapters_of(model).values())

    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    summed = llama()  # the reference: W + BA of the first + BA of the second, in a model without adapters
    for name in ("default", "other"):
        values = {key: value.detach() for key, value in adapters_of(model, name).items()}
        scaling = {"default": 4.0 / 2, "other": 9.0 / 3}[name]
        for key in values:
            if key.endswith(".lora_A"):
                module = key.removesuffix(".lora_A")
                summed.get_submodule(module).weight.data += scaling * values[f"{module}.lora_B"] @ values[key]
    torch.testing.assert_close(both, logits(summed), rtol=0, atol=1e-5)

    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("other")
    assert not adapters_of(model, "other")
    assert "other" not in model.peft_config
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected_base)


def test_two_adapters_are_saved_and_loaded_side_by_side(tmp_path):
    model = with_adapters(llama(), r=2, target_modules=["q_proj"])
    model.add_adapter("other", SparseLoraConfig(r=3, target_modules=["up_proj"]))
    randomize(model, seed=2, adapter_name="other")
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other"):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), expected[name])
    assert not torch.allclose(expected["default"], expected["other"], atol=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_an_adapter_that_is_not_finite(value):
    model = with_adapters(llama(), r=2, target_modules=["down_proj"])
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    layer.lora_B["default"].weight.data[0, 0] = value
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


def test_the_trainer_of_transformers_trains_and_saves_it(tmp_path):
    model = get_peft_model(llama(), SparseLoraConfig(r=2, train_omega=True, task_type="CAUSAL_LM"))
    before = tensors_of(model)
    row = {"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, settings, train_dataset=[row] * 4, data_collator=default_data_collator)
    result = trainer.train()
    assert result.global_step == 2
    assert 0 < result.training_loss < 100
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".lora_" in name}
    trainer.save_model(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
