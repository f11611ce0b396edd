"""A full run's model is the one that was measured: buffers, tied and fused weights, heads, templates, own code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DeepseekV3Config,
    MarianConfig,
    MixtralConfig,
)

from helpers.contexts import open_context
from helpers.tiny_models import randomize
from helpers.trained_runs import PLANS, make_run
from sparse_llm_ft.adapters import add_adapters, build, trained_parameters
from sparse_llm_ft.config import merge, parse_config
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.engine.build import untrained_tensors
from sparse_llm_ft.export.adapter import export
from sparse_llm_ft.export.export import export_run
from sparse_llm_ft.export.options import ExportOptions
from sparse_llm_ft.export.read_back import WrittenWrongly
from sparse_llm_ft.export.serve_lines import serve_lines
from sparse_llm_ft.export.staging import stage
from sparse_llm_ft.export.trial import try_export
from sparse_llm_ft.inference.trained_run import read_run
from sparse_llm_ft.io.atomic import MANIFEST
from sparse_llm_ft.model.buffers import persistent_buffers
from sparse_llm_ft.model.loading import load_model

IDS = torch.tensor([[1, 5, 9, 12, 7, 3], [1, 4, 4, 20, 11, 8]])
EXPERTS = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
SMALL = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STACKS = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}
CONFIGS = {
    "buffers": DeepseekV3Config(**EXPERTS, **LATENT),
    "fused experts": MixtralConfig(**EXPERTS, num_local_experts=4),
    "fixed positions": MarianConfig(**SMALL, **STACKS),
    **{
        kind: AutoConfig.for_model(kind, **SMALL, **sizes)
        for kind, sizes in {
            "bart": STACKS,
            "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
            "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64},
            "bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2},
            "falcon": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            "gemma2": {k: v for k, v in EXPERTS.items() if k not in SMALL} | {"head_dim": 8},
            "gpt_oss": {k: v for k, v in EXPERTS.items() if k not in SMALL} | {"head_dim": 8, "num_local_experts": 4},
        }.items()
    },
    "tied": AutoConfig.for_model("llama", **EXPERTS, tie_word_embeddings=True),
}


def stock_class(config: Any) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def base_folder(config: Any, model_folder: Path, folder: Path) -> Path:
    """A random model with the tiny tokenizer; its persistent buffers are not what a fresh model has."""
    torch.manual_seed(0)
    model = stock_class(config).from_config(config, dtype=torch.float32)
    for name in persistent_buffers(model):
        model.get_buffer(name).copy_(torch.linspace(3, -3, model.get_buffer(name).numel()))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


def full(settings: dict, folder: Path, **model: Any) -> RunContext:
    changes = {"model": {"name": str(folder)} | model, "method": {"name": "full"}}
    return open_context(parse_config(merge(settings, changes)))


def trained(context: RunContext) -> nn.Module:
    """The base with other values of all parameters that a full run trains."""
    base = load_model(context.config.model, context.task_mode)
    model = add_adapters(base, context.first_phase().plan)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return base.eval()


def written(context: RunContext, model: nn.Module, folder: Path) -> Path:
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = {name: values[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    export(folder, context, context.first_phase().plan, trained, untrained_tensors(model))
    return folder


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=IDS, **decoder).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_a_full_model_is_the_one_that_was_measured(
    name: str, settings: dict, model_folder: Path, tmp_path: Path
) -> None:
    base = base_folder(CONFIGS[name], model_folder, tmp_path / "base")
    context = full(settings, base)
    try_export(context, context.first_phase().plan)
    model = trained(context)
    assert any("correction" in tensor for tensor in untrained_tensors(model)) == (name == "buffers")
    folder = written(context, model, tmp_path / "model")
    stock = stock_class(CONFIGS[name]).from_pretrained(folder)
    assert torch.equal(logits(stock), logits(model)) and stock.dtype == torch.float32
    assert stock.config.use_cache and stock.generation_config.eos_token_id == 2
    # The names are those of the hub's files.
    assert _names(folder) == _names(base)


def _names(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_a_full_classifier_keeps_head_and_labels(
    settings: dict, encoder_folder: Path, labelled_folder: Path, tmp_path: Path
) -> None:
    settings["task"] = {"name": "custom", "path": str(labelled_folder), "labels": ["no", "yes"], "texts": ["sentence"]}
    settings["evaluation"]["samples"] = 0
    context = full(settings, encoder_folder)
    try_export(context, context.first_phase().plan)
    model = trained(context)
    stock = AutoModelForSequenceClassification.from_pretrained(written(context, model, tmp_path / "model"))
    assert torch.equal(logits(stock), logits(model)) and stock.config.id2label == {0: "no", 1: "yes"}


def test_a_model_without_its_buffers_is_never_complete(settings: dict, model_folder: Path, tmp_path: Path) -> None:
    context = full(settings, base_folder(CONFIGS["buffers"], model_folder, tmp_path / "base"))
    values = {name: p.detach() for name, p in trained(context).named_parameters()}
    with pytest.raises(WrittenWrongly, match="e_score_correction_bias"):
        export(tmp_path / "model", context, context.first_phase().plan, values, {})
    assert not (tmp_path / "model").exists()


def test_an_adapter_that_a_disk_changes_is_never_complete(settings: dict, tmp_path: Path, monkeypatch) -> None:
    context = open_context(parse_config(settings))
    model = add_adapters(load_model(context.config.model), context.plan)
    randomize(model)
    values = {name: p.detach() for name, p in trained_parameters(model).items()}
    export(tmp_path / "adapter", context, context.plan, values, {})
    save = build.save_file
    monkeypatch.setattr(
        build, "save_file", lambda tensors, *a, **o: save({k: t * 0.999 for k, t in tensors.items()}, *a, **o)
    )
    with pytest.raises(WrittenWrongly, match=r"lora_A.*other values"):
        export(tmp_path / "other", context, context.plan, values, {})
    assert not (tmp_path / "other").exists()


@pytest.fixture
def several_templates(model_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "templates"
    shutil.copytree(model_folder, folder)
    path = folder / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    templates = [{"name": name, "template": f"{name} {template}"} for name in ("default", "tool_use")]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    return folder


def test_every_chat_template_comes_along(settings: dict, several_templates: Path, tmp_path: Path) -> None:
    context = full(settings, several_templates)
    try_export(context, context.first_phase().plan)
    outputs = [written(context, trained(context), tmp_path / "model")]
    run = merge(settings, {"model": {"name": str(several_templates)}})
    make_run(run, PLANS["lora"])
    export_run(read_run(run["output_dir"]), tmp_path / "merged", ExportOptions(to="merged"))
    listed = stage(read_run(run["output_dir"]), tmp_path / "pushed", "me/tiny", ExportOptions(to="merged"))
    assert "additional_chat_templates/tool_use.jinja" in listed
    for folder in (*outputs, tmp_path / "merged", tmp_path / "pushed"):
        templates = AutoTokenizer.from_pretrained(folder).chat_template
        assert {name: text.split()[0] for name, text in templates.items()} == {n: n for n in ("default", "tool_use")}
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert set(json.loads((folder / MANIFEST).read_text())) == files - {MANIFEST}


def test_a_model_ends_its_texts_where_training_has_ended_them(
    settings: dict, model_folder: Path, tmp_path: Path
) -> None:
    """By the template's end of turns, which is not this base's end of sequences. An adapter cannot say so."""
    base = tmp_path / "chatty"
    shutil.copytree(model_folder, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    end = tokenizer.convert_tokens_to_ids("cake")
    tokenizer.add_special_tokens({"additional_special_tokens": ["cake"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} cake {% endfor %}"
    tokenizer.save_pretrained(base)
    assert tokenizer.convert_tokens_to_ids("cake") == end != tokenizer.eos_token_id
    context = full(settings, base)
    folders = [written(context, trained(context), tmp_path / "model")]
    run = merge(settings, {"model": {"name": str(base)}})
    make_run(run, PLANS["lora"])
    opened = read_run(run["output_dir"])
    export_run(opened, tmp_path / "merged", ExportOptions(to="merged"))
    for folder in (*folders, tmp_path / "merged"):
        ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        assert ends == [tokenizer.eos_token_id, end], folder
    export_run(opened, tmp_path / "adapter", ExportOptions())
    lines = serve_lines(opened, tmp_path / "adapter", ExportOptions(), str(base), "adapter")
    assert lines[-1] == f"# completions end with cake: give it with each request (stop_token_ids: [{end}])"


@pytest.fixture
def own_code(model_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    shutil.copytree(model_folder, folder)
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (folder / "configuration_own.py").write_text(
        'from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = "own_llama"\n'
    )
    own = {
        "model_type": "own_llama",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    return folder


def test_a_models_own_code_comes_along(settings: dict, own_code: Path, tmp_path: Path) -> None:
    context = full(settings, own_code, trust_remote_code=True)
    try_export(context, context.first_phase().plan)
    model = trained(context)
    folder = written(context, model, tmp_path / "model")
    shutil.rmtree(own_code)
    stock = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(stock).__name__ == "OwnForCausalLM" and torch.equal(logits(stock), logits(model))


def test_the_line_about_own_code_names_the_setting(settings: dict, own_code: Path) -> None:
    with pytest.raises(
        Exception, match=r"^model.trust_remote_code: false, but .* needs code of its own.*expected true"
    ):
        full(settings, own_code)
