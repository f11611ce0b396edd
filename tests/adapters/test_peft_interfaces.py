"""What PEFT, transformers and accelerate offer for adapters beside `PeftModel`: the same output for every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers.integrations.peft
from accelerate import cpu_offload
from peft import (
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_llm_ft.adapters import SparseLoraConfig, SparseLoraLayer
from sparse_llm_ft.plan import AdapterPlan, IndexMask, ModuleAdapter

MODULES = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
HALF = IndexMask(16, tuple(range(0, 16, 2)))
KINDS = {
    "plain": ModuleAdapter(2, 4.0),
    "omega": ModuleAdapter(2, 4.0, train_omega=True),
    "group": ModuleAdapter(2, 4.0, group="g"),
    "rows": ModuleAdapter(2, 4.0, rows=HALF),
    "cols": ModuleAdapter(2, 4.0, cols=HALF),
}
TENSORS = {"plain": 4, "omega": 6, "group": 2, "rows": 4, "cols": 4}
IDS = torch.arange(3, 15)[None]


def base(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(dtype)


def config(kind: str) -> SparseLoraConfig:
    return SparseLoraConfig(plan=AdapterPlan(dict.fromkeys(MODULES, KINDS[kind])))


def awake(model: nn.Module) -> nn.Module:
    """With a B that is not zero."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def saved(kind: str, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """An adapter's folder, and the logits of the model that it was saved from."""
    model = awake(get_peft_model(base(), config(kind)))
    model.save_pretrained(tmp_path)
    expected = logits(model)
    assert (expected - logits(base())).abs().max() > 0.1
    return tmp_path, expected


def test_injection_keeps_every_parameter(kind: str) -> None:
    model = awake(inject_adapter_in_model(config(kind), base()))
    assert len(get_peft_model_state_dict(model)) == TENSORS[kind]
    assert sum(p.requires_grad for p in model.parameters()) == TENSORS[kind]
    assert torch.equal(logits(model), logits(awake(get_peft_model(base(), config(kind)))))


def test_transformers_add_adapter_trains_and_saves(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0.18.0")  # it asks for a later PEFT
    model = base()
    model.add_adapter(config(kind))
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert sum(p.grad is not None for p in model.parameters()) == TENSORS[kind]
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == TENSORS[kind]


def test_transformers_load_adapter(saved: tuple[Path, torch.Tensor]) -> None:
    folder, expected = saved
    model = base()
    model.load_adapter(str(folder))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_from_pretrained(saved: tuple[Path, torch.Tensor], low_cpu_mem_usage: bool) -> None:
    folder, expected = saved
    model = PeftModel.from_pretrained(base(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model), expected)


def test_a_group_s_names_of_release_0_1_are_read(tmp_path: Path) -> None:
    model = awake(get_peft_model(base(), config("group")))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    old = {f"base_model.lora_shared.g.{name.split('o_proj.')[1]}": tensor for name, tensor in tensors.items()}
    assert set(old) == {f"base_model.lora_shared.g.lora_{part}.weight" for part in "AB"}
    save_file(old, file)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(model))


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_autocast_adapter_dtype(kind: str, autocast: bool, dtype: torch.dtype) -> None:
    model = get_peft_model(base(torch.bfloat16), config(kind), autocast_adapter_dtype=autocast)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {dtype}
    model(input_ids=IDS)


def test_status(kind: str) -> None:
    model = get_peft_model(base(), config(kind))
    for layer in get_layer_status(model):
        assert layer.available_adapters == ["default"]
    status = get_model_status(model)
    assert status.requires_grad == {"default": True} and status.num_adapter_layers == 2


def test_offloaded_to_the_cpu(kind: str) -> None:
    model = awake(get_peft_model(base(), config(kind)))
    expected = logits(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    # Modules that move their weights in hooks are called one by one, which rounds differently.
    torch.testing.assert_close(logits(model), expected)


def test_input_casting_can_be_disabled(kind: str) -> None:
    model = get_peft_model(base(), config(kind))
    with disable_input_dtype_casting(model):
        assert not any(m.cast_input_dtype_enabled for m in model.modules() if isinstance(m, SparseLoraLayer))
        logits(model)


def test_an_adapter_for_each_row_is_refused(kind: str) -> None:
    model = get_peft_model(base(), config(kind))
    with pytest.raises(ValueError, match=r"adapter_names: one adapter for each row is not supported"):
        model(input_ids=IDS.repeat(2, 1), adapter_names=["default", "__base__"])


def test_layers_show_what_other_libraries_read(kind: str) -> None:
    model = get_peft_model(base(), config(kind))
    for layer in (m for m in model.modules() if isinstance(m, SparseLoraLayer)):
        assert (layer.r, layer.lora_alpha, layer.scaling) == ({"default": 2}, {"default": 4.0}, {"default": 2.0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"r": 0}, "SparseLoraConfig.r: 0 is not allowed"), ({"target_modules": ["nope"]}, "'nope' matches no linear")],
)
def test_wrong_settings_raise_what_peft_s_callers_expect(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(base(), SparseLoraConfig(**settings))
