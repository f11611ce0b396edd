"""GPT-2's layers, transformers' `Conv1D`, store weights as (in, out): adapters, scores, masks, merging, export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
from helpers.tiny_models import IDS, MODELS, adapters_of, logits, with_adapters
from sparse_llm_ft.adapters import (
    SparseLoraLayer,
    add_adapters,
    base_options,
    find_targets,
    save_peft_adapter,
    trained_parameters,
)
from sparse_llm_ft.adapters.tuners import TUNERS
from sparse_llm_ft.config import ModelConfig, merge
from sparse_llm_ft.export.export import export_run
from sparse_llm_ft.export.merge import merge_adapters
from sparse_llm_ft.export.options import ExportOptions
from sparse_llm_ft.inference.trained_run import load_trained, read_run
from sparse_llm_ft.model.linear import linear_shape, restore_transposed
from sparse_llm_ft.model.loading import empty_model, load_model
from sparse_llm_ft.plan import AdapterPlan, IndexMask, ModuleAdapter, uniform_plan
from sparse_llm_ft.scoring.importance import dense_weight

FC = "transformer.h.1.mlp.c_fc"
GPT2 = MODELS["gpt2"]


def test_shapes_are_outputs_by_inputs() -> None:
    found = find_targets(GPT2.build(), "all-linear")
    assert found.keys() == GPT2.targets
    assert found["transformer.h.0.attn.c_attn"] == (96, 32) and found[FC] == (48, 32)
    attention = nn.MultiheadAttention(8, 2)  # it never calls its output layer
    assert linear_shape(attention.out_proj) is None and linear_shape(nn.Linear(3, 5)) == (5, 3)


def masked_plan() -> AdapterPlan:
    """One adapter with kept rows and columns and an omega, one pair that two modules share."""
    masked = ModuleAdapter(4, 8.0, 0.7, rows=IndexMask(48, (0, 5, 47)), cols=IndexMask(32, (1, 30)))
    shared = ModuleAdapter(2, 6.0, group="proj")
    names = [f"transformer.h.{i}.mlp.c_proj" for i in (0, 1)]
    return AdapterPlan({FC: masked} | dict.fromkeys(names, shared))


def test_an_adapter_computes_and_merges_what_its_matrices_say() -> None:
    model = with_adapters(GPT2.build(), plan=masked_plan())
    layer = model.base_model.model.get_submodule(FC)
    assert isinstance(layer, SparseLoraLayer) and layer.base_layer.weight.shape == (32, 48)
    delta = layer.get_delta_weight("default").detach()
    assert delta.shape == (48, 32) and delta[5].any() and not delta[6].any() and not delta[:, 2].any()
    x = torch.randn(2, 3, 32)
    weight = dense_weight(layer.base_layer)
    torch.testing.assert_close(layer(x), x @ (weight + delta).T + layer.base_layer.bias, rtol=1e-4, atol=1e-5)

    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, weight.T, rtol=0, atol=1e-6)
    merged = merge_adapters(model)
    assert isinstance(merged.get_submodule(FC), Conv1D)
    torch.testing.assert_close(merged(input_ids=IDS).logits, before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tuner", TUNERS)
def test_every_tuner_exports_what_peft_computes_and_merges(tuner: str, tmp_path: Path) -> None:
    options = {"target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 9} if tuner == "adalora" else {}
    base = GPT2.build()
    uniform = uniform_plan(find_targets(base, "all-linear"), 4, 8.0)
    plan = AdapterPlan(uniform.modules, tuner=tuner, options=options)
    model = add_adapters(base, plan).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in trained_parameters(model).values():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    expected = logits(model)
    tensors = {name: parameter.detach().float() for name, parameter in trained_parameters(model).items()}
    save_peft_adapter(tmp_path, plan, tensors, "base", None, options=base_options(GPT2.build(), plan))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True

    loaded = PeftModel.from_pretrained(GPT2.build(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(merge_adapters(model)), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(expected, logits(GPT2.build()), atol=1e-2)


def test_the_dense_weight_is_outputs_by_inputs_in_4_bit_too(tmp_path: Path) -> None:
    GPT2.build().save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), dtype="float32", quantization="nf4")
    layer, plain = load_model(config).get_submodule(FC), GPT2.build().get_submodule(FC)
    weight = dense_weight(layer)
    assert weight.shape == (48, 32) and linear_shape(layer) == (48, 32)
    torch.testing.assert_close(weight, plain.weight.T, rtol=0, atol=0.2)
    assert torch.corrcoef(torch.stack([weight.flatten(), plain.weight.T.flatten()]))[0, 1] > 0.98


def test_dequantised_layers_are_stored_transposed_again(tmp_path: Path) -> None:
    GPT2.build().save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), dtype="float32", quantization="nf4")
    model = load_model(config)
    expected = logits(model)
    model.dequantize()
    restore_transposed(model, empty_model(config))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-3)
    model.config.__dict__.pop("quantization_config", None)
    assert model.get_submodule(FC).weight.shape == (32, 48)


@pytest.fixture
def gpt2(settings: dict, model_folder: Path, tmp_path: Path) -> dict:
    """Settings of a run on a tiny GPT-2."""
    folder = tmp_path / "gpt2"
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    tokens = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, **tokens)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, folder / name)
    settings["model"]["name"] = str(folder)
    return settings


def test_runs_derive_train_and_export_plain_and_sharded_in_4_bit(gpt2: dict, tmp_path: Path) -> None:
    gpt2["training"]["max_steps"] = 2
    partial = {"name": "partial_lora", "ratios": "pyramidal", "ratio": 0.5, "selection": "targeted"}
    partial["cache_dir"] = str(tmp_path / "cache")
    trees = {
        "svd": merge(gpt2, {"method": partial, "output_dir": str(tmp_path / "svd")}),
        "imp": merge(
            gpt2,
            {
                "method": partial | {"importance": "imp", "masking": "compact"},
                "output_dir": str(tmp_path / "imp"),
                "model": {"quantization": "nf4"},
                "deepspeed": {"zero_stage": 3},
            },
        ),
    }
    worlds = {name: {"trees": tree, "world_size": 2} for name, tree in trees.items()}
    statuses = run_worlds(worlds, tmp_path / "logs")
    ids = torch.arange(12).view(2, 6)
    for name in trees:
        assert statuses[name] == [0, 0], last_lines(tmp_path / "logs" / name)
        run = read_run(str(tmp_path / name))
        export_run(run, tmp_path / f"{name}-merged", ExportOptions("merged"))
        merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-merged", dtype="float32"), ids)
        torch.testing.assert_close(merged, logits(load_trained(run), ids), rtol=0, atol=1e-3)
    base = AutoModelForCausalLM.from_pretrained(gpt2["model"]["name"], dtype="float32")
    stock = PeftModel.from_pretrained(base, tmp_path / "svd" / "adapter")
    torch.testing.assert_close(logits(stock, ids), logits(load_trained(read_run(str(tmp_path / "svd"))), ids))


def test_adapters_have_the_names_of_other_models() -> None:
    assert {name.rpartition(".")[0] for name in adapters_of(with_adapters(GPT2.build()))} == GPT2.targets
