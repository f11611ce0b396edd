"""Which modules `target_modules` means, and what is said when it means none."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from helpers.tiny_models import LLAMA_MODULES, llama
from sparse_llm_ft.adapters import SparseLoraConfig, check_plan, find_targets
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter, PlanError

ENDINGS = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"


@pytest.fixture(scope="module")
def model():
    return llama()


def test_all_linear(model):
    assert list(find_targets(model, "all-linear")) == [f"model.layers.{i}.{m}" for i in (0, 1) for m in LLAMA_MODULES]


@pytest.mark.parametrize("kind", [list, tuple])
def test_endings_are_matched_at_dots_and_found_in_the_models_order(model, kind):
    found = find_targets(model, kind(["up_proj", "self_attn.q_proj", "model.layers.1.self_attn.k_proj"]))
    assert found == {
        "model.layers.0.self_attn.q_proj": (32, 32),
        "model.layers.0.mlp.up_proj": (96, 32),
        "model.layers.1.self_attn.q_proj": (32, 32),
        "model.layers.1.self_attn.k_proj": (16, 32),
        "model.layers.1.mlp.up_proj": (96, 32),
    }
    assert next(iter(found)) == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("ending", "problem"),
    [
        ("proj", "matches no linear layer of the model"),
        ("", "matches no linear layer of the model"),
        ("lm_head", "is the output head, which never has adapters"),
        ("embed_tokens", "is of class Embedding, not a linear layer"),
        ("norm", "is of class LlamaRMSNorm, not a linear layer"),
        ("1.self_attn", "is of class LlamaAttention, which holds the linear layers q_proj, k_proj, v_proj, o_proj"),
    ],
)
def test_an_ending_without_match_is_an_error_that_says_what_is_there(model, ending, problem):
    with pytest.raises(ConfigError) as error:
        find_targets(model, ["q_proj", ending])
    assert error.value.setting == "adapter.target_modules"
    assert f"{ending!r} {problem}; " in str(error.value)
    assert f"found: {ENDINGS}" in str(error.value)
    whole = "or adapter.modules_to_save to train it whole" in str(error.value)
    assert whole == (ending in ("lm_head", "embed_tokens", "norm"))


def test_a_pattern_is_matched_against_whole_names(model):
    found = find_targets(model, r"model\.layers\.1\..*(q|k)_proj")
    assert list(found) == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]


@pytest.mark.parametrize("pattern", ["q_proj", r"model\.layers\.1", r"layers\.0\.mlp\.up_proj", "lm_head"])
def test_a_pattern_that_matches_part_of_a_name_is_an_error_that_says_what_is_there(model, pattern):
    with pytest.raises(ConfigError) as error:
        find_targets(model, pattern)
    assert repr(pattern) in str(error.value)
    assert f"found: {ENDINGS}" in str(error.value)


def test_an_invalid_pattern_is_said_to_be_one(model):
    with pytest.raises(ConfigError, match="is not a regular expression") as error:
        find_targets(model, "layers.(0|1")
    assert error.value.setting == "adapter.target_modules"


def test_no_endings_at_all_match_nothing(model):
    with pytest.raises(ConfigError, match="matches no linear layer"):
        find_targets(model, [])


def test_a_model_without_linear_layers_says_so():
    with pytest.raises(ConfigError, match="no linear layer at all"):
        find_targets(nn.Sequential(nn.LayerNorm(4)), "all-linear")


def test_a_model_on_the_meta_device_will_do(model):
    with torch.device("meta"):
        empty = LlamaForCausalLM(model.config)
    for wanted in ("all-linear", ["q_proj"], r".*\.up_proj"):
        assert find_targets(empty, wanted) == find_targets(model, wanted)


@pytest.mark.parametrize("wanted", ["all-linear", ["q_proj", "up_proj"], r"model\.layers\.0\..*"])
def test_a_layer_that_carries_adapters_counts_under_its_own_name(wanted):
    expected = find_targets(llama(), wanted)
    wrapped = get_peft_model(llama(), SparseLoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert find_targets(wrapped.base_model.model, wanted) == expected
    wrapped.add_adapter("other", SparseLoraConfig(r=3, target_modules=["q_proj"]))
    assert find_targets(wrapped.base_model.model, wanted) == expected


def test_check_plan_accepts_what_fits_and_names_what_does_not(model):
    k_proj = "model.layers.0.self_attn.k_proj"
    check_plan(model, AdapterPlan({k_proj: ModuleAdapter(16, 1.0), "model.layers.1.mlp.up_proj": None}))
    with pytest.raises(PlanError, match=rf"{k_proj}.*rank 17 is larger than its matrix \(16 × 32\)"):
        check_plan(model, AdapterPlan({k_proj: ModuleAdapter(17, 1.0)}))
    with pytest.raises(PlanError, match=rf"'model\.layers\.2\.mlp\.up_proj'.*the model has {ENDINGS}"):
        check_plan(model, AdapterPlan({k_proj: ModuleAdapter(4, 1.0), "model.layers.2.mlp.up_proj": None}))
