"""Weights that no adapter can go on: named by kind and share, refused under all-linear, shown in plan and summary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from helpers.contexts import open_context
from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
from helpers.tiny_models import llama
from helpers.trained_runs import make_run
from sparse_llm_ft.adapters.left_out import LeftOut, find_left_out, refuse_left_out
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.export.export import export_run
from sparse_llm_ft.export.options import ExportOptions
from sparse_llm_ft.inference.trained_run import read_run
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter
from sparse_llm_ft.run_folder import RunFolder
from sparse_llm_ft.training.run import Run

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BOTH = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
KINDS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "mixtral": ({"num_local_experts": 4}, BOTH),
    "qwen3_moe": ({"num_experts": 4, "num_experts_per_tok": 2}, BOTH),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2}, BOTH),
    "llama4_text": (
        {"num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
        {"feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"},
    ),
    "deepseek_v3": (
        {
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        },
        BOTH,
    ),
    "granitemoe": (
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"},
    ),
}


def empty(kind: str) -> PreTrainedModel:
    settings, _ = KINDS[kind]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | settings))


@pytest.mark.parametrize("kind", KINDS)
def test_fused_experts_are_found_by_their_shape(kind: str) -> None:
    model = empty(kind)
    found = find_left_out(model)
    experts = [p.numel() for name, p in model.named_parameters() if ".experts." in name]
    assert found.kinds.keys() == KINDS[kind][1]
    large = sum(size for size in experts if size >= 32 * 32)
    assert sum(found.kinds.values()) >= 0.9 * large and found.share > 0.4


def test_experts_stacked_in_a_matrix_are_found_and_routers_are_not() -> None:
    ffn = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
    attention = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}
    sizes = {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 4}
    settings = transformers.DbrxConfig(**sizes, ffn_config=ffn, attn_config=attention)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    assert find_left_out(model).kinds == {f"ffn.experts.mlp.{name}": 4 * 48 * 32 for name in ("w1", "v1", "w2")}


def test_a_model_of_linear_layers_leaves_nothing_out() -> None:
    assert find_left_out(llama()) == LeftOut()
    mamba = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=8)
    with torch.device("meta"):
        assert find_left_out(AutoModelForCausalLM.from_config(mamba)) == LeftOut()


def test_all_linear_is_refused_with_the_list_that_means_the_same() -> None:
    left_out = LeftOut({"mlp.experts.down_proj": 10}, 0.9)
    targets = ["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj"]
    with pytest.raises(ConfigError) as error:
        refuse_left_out("all-linear", left_out, targets)
    assert str(error.value) == (
        "adapter.target_modules: all-linear, but no adapter can go on mlp.experts.down_proj (90% of the layers' "
        "weights), which are parameters and no linear layers; expected the list [q_proj, v_proj] to train the model "
        "without them"
    )
    refuse_left_out(["q_proj"], left_out, targets)
    refuse_left_out("all-linear", LeftOut(), targets)


@pytest.fixture
def mixtral(settings: dict, model_folder: Path, tmp_path: Path) -> dict:
    """Settings of a run on a tiny Mixtral."""
    folder = tmp_path / "mixtral"
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 16, "intermediate_size": 24, "head_dim": 4}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes, num_local_experts=4)).save_pretrained(
        folder
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, folder / name)
    settings["model"]["name"] = str(folder)
    return settings


def test_every_command_refuses_all_linear_on_experts_but_not_when_all_is_trained(mixtral: dict) -> None:
    with pytest.raises(ConfigError, match=r"expected the list \[q_proj, k_proj, v_proj, o_proj\]"):
        open_context(parse_config(mixtral))
    mixtral["method"] = {"name": "full"}
    assert open_context(parse_config(mixtral)).left_out.kinds.keys() == BOTH


def test_a_run_that_was_made_with_all_linear_is_still_measured_written_and_resumed(
    mixtral: dict, tmp_path: Path
) -> None:
    """The refusal is for those who plan a run. This one is from a release without a setting that has come since."""
    attention = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkvo"]
    plan, tree = AdapterPlan({name: ModuleAdapter(4, 8.0) for name in attention}), parse_config(mixtral).model_dump()
    folder, moved = Path(mixtral["output_dir"]), tmp_path / "moved"
    make_run(mixtral, plan)
    assert open_context(parse_config(mixtral)).left_out.kinds.keys() == BOTH  # to resume it

    shutil.rmtree(folder)
    del tree["model"]["resize_embeddings"]
    with mock.patch.object(RunFolder, "identity", lambda config: RunFolder(folder).stored_identity()):
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(tree))))
        make_run(mixtral, plan)
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(tree))))
    folder.rename(moved)
    run = read_run(str(moved))
    assert set(run.plan.active) == set(attention)
    for form in ("peft", "merged"):
        export_run(run, tmp_path / form, ExportOptions(form))
    command = {"command": ["evaluate", str(moved), "--output", str(tmp_path / "again")]}
    statuses = run_worlds({"again": {"trees": command, "world_size": 1}}, tmp_path / "logs")
    assert statuses == {"again": [0]}, last_lines(tmp_path / "logs" / "again")


def test_plan_log_and_summary_show_what_gets_no_adapters(mixtral: dict, tmp_path: Path, capsys: Any) -> None:
    mixtral["adapter"]["target_modules"] = ["q_proj", "v_proj"]
    mixtral["model"]["quantization"] = "nf4"
    context = open_context(parse_config(mixtral))
    line = "mlp.experts.gate_up_proj, mlp.experts.down_proj ("
    printed = capsys.readouterr().out
    assert f"no adapter can go on {line}" in printed
    assert "nf4 is for linear layers" in printed and "stay in float32" in printed

    mixtral["model"]["quantization"] = "none"
    context = open_context(parse_config(mixtral))
    assert any(text.startswith(f"without adapters: {line}") for text in Run.prepare(context).describe())
    mixtral["training"]["max_steps"] = 1
    statuses = run_worlds({"run": {"trees": mixtral, "world_size": 1}}, tmp_path / "logs")
    log = last_lines(tmp_path / "logs" / "run", 10_000)
    assert statuses == {"run": [0]} and f"without adapters: {line}" in log, log
    assert RunFolder(mixtral["output_dir"]).summary()["without_adapters"]["kinds"].keys() == BOTH
