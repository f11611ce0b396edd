"""`export --for`: zero pairs where a server needs them, GGUF, and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from helpers.trained_runs import PLANS, make_run
from sparse_llm_ft.cli.main import main
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.export.export import export_run
from sparse_llm_ft.export.gguf_file import check_gguf, write_gguf
from sparse_llm_ft.export.options import ExportOptions
from sparse_llm_ft.inference.trained_run import read_run
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter
from sparse_llm_ft.serving.facts import read_facts
from sparse_llm_ft.serving.servers import SERVERS, judge

IDS = torch.tensor([[1, 5, 9, 12, 7, 3]])
Q, K, V, UP, OUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "self_attn.o_proj")


def on(*modules: tuple[int, str]) -> AdapterPlan:
    return AdapterPlan({f"model.layers.{layer}.{kind}": ModuleAdapter(3 + layer, 5.0) for layer, kind in modules})


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("server", "modules", "added"),
    [
        ("vllm", [(0, K), (1, UP)], []),
        ("sglang", [(0, Q), (0, V), (1, OUT)], []),
        ("sglang", [(0, K), (1, UP)], [(0, Q), (0, V), (1, "mlp.gate_proj")]),
        ("sglang", [(0, V), (1, Q)], [(0, Q), (1, V)]),
        ("tgi", [(0, K), (1, UP), (0, OUT), (1, OUT)], [(1, K), (0, UP)]),
    ],
)
def test_a_server_gets_the_zero_pairs_that_it_needs_and_logits_stay(
    server: str, modules: list, added: list, settings: dict, loud_folder: Path, tmp_path: Path
) -> None:
    expected = logits(make_run(settings, on(*modules)))
    run = read_run(settings["output_dir"])
    export_run(run, tmp_path / "plain", ExportOptions())
    export_run(run, tmp_path / "out", ExportOptions(server=server))
    names = {f"model.layers.{layer}.{kind}" for layer, kind in added}
    facts = read_facts(tmp_path / "out")
    assert set(facts.pairs) - set(read_facts(tmp_path / "plain").pairs) == names
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name in names:
        assert not any(weights[f"base_model.model.{name}.lora_{part}.weight"].any() for part in "AB")
    assert judge(facts, SERVERS[server]).right
    assert judge(read_facts(tmp_path / "plain"), SERVERS[server]).right == (not names)
    base = AutoModelForCausalLM.from_pretrained(loud_folder, dtype=torch.float32)
    loaded = logits(PeftModel.from_pretrained(base, tmp_path / "out"))
    assert (loaded - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_what_a_server_cannot_hold_is_one_line(settings: dict, tmp_path: Path) -> None:
    plan = AdapterPlan({f"model.layers.0.{Q}": ModuleAdapter(4, 8.0)}, trained=("lm_head",))
    make_run(settings, plan)
    run = read_run(settings["output_dir"])
    for server, label in {
        "vllm": "vLLM",
        "llama.cpp": "llama.cpp",
        "ollama": "llama.cpp",
        "tgi": "TGI",
        "sglang": "SGLang",
    }.items():
        with pytest.raises(
            UserError, match=rf"^--for {server}: {label}.* would not compute what was trained \(.*lm_head"
        ):
            export_run(run, tmp_path / "out", ExportOptions(server=server))
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("server", ["vllm", "ollama"])
def test_only_a_causal_language_model_has_a_server(
    server: str, settings: dict, encoder_folder: Path, labelled_folder: Path, tmp_path: Path
) -> None:
    """Nothing would load the export, and no command was printed."""
    settings["model"]["name"] = str(encoder_folder)
    settings["task"] = {"name": "custom", "path": str(labelled_folder), "labels": ["no", "yes"], "texts": ["sentence"]}
    make_run(settings, None)
    with pytest.raises(UserError, match=rf"^--for {server}: .* a model for sequence_classification, and servers take"):
        export_run(read_run(settings["output_dir"]), tmp_path / "out", ExportOptions(server=server))


def test_the_export_prints_the_servers_commands(settings: dict, capsys: Any) -> None:
    plan = AdapterPlan({f"model.layers.{i}.{kind}": ModuleAdapter(8, 16.0) for i in range(2) for kind in (Q, V)})
    make_run(settings, plan)
    run, base = settings["output_dir"], settings["model"]["name"]
    main(["export", run, "--rank", "48"])
    printed = capsys.readouterr()
    folder = json.loads(printed.out)["folder"]
    assert printed.err.splitlines()[2:] == [
        f"vllm: vllm serve {base} --enable-lora --max-lora-rank 64 --lora-modules tuned={folder}",
        f"sglang: python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths tuned={folder}",
        f"tgi: text-generation-launcher --model-id {base} --lora-adapters tuned={folder}",
    ]
    main(["export", run, "--for", "ollama", "--output", f"{run}/ollama"])
    assert capsys.readouterr().err == f"ollama: ollama create tuned --file {run}/ollama/Modelfile\n"
    assert sorted(path.name for path in Path(run, "ollama").iterdir()) == ["Modelfile", "adapter.gguf", "manifest.json"]
    assert f"\nFROM {base}\nADAPTER ./adapter.gguf\n" in Path(run, "ollama", "Modelfile").read_text()


def test_an_adapter_that_keeps_its_tuner_gets_no_command(settings: dict, capsys: Any) -> None:
    make_run(settings, PLANS["dora"])
    main(["export", settings["output_dir"]])
    assert capsys.readouterr().err == (
        "vLLM from 0.32 on: refused: it does not take DoRA; `sparse-llm-ft export --to merged` is for any server\n"
    )


SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 30}  # fmt: skip
BASES = {"llama": (LlamaConfig, True), "mistral": (MistralConfig, True), "qwen2": (Qwen2Config, False),
         "qwen3": (Qwen3Config, False)}  # fmt: skip
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down"}  # fmt: skip


@pytest.mark.parametrize("family", BASES)
def test_the_gguf_has_llama_cpps_names_and_order_of_rows(family: str, tmp_path: Path) -> None:
    """A head's rows 0 1 2 | 3 4 5 become 0 3 1 4 2 5 in a Llama's queries and keys, and stay elsewhere."""
    kind, permuted = BASES[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(kind(**SIZES))
    check_gguf(model, "llama.cpp")
    weights = {}
    for layer in range(2):
        for module in NAMES:
            name = f"model.layers.{layer}.{module}"
            d_out, d_in = model.get_submodule(name).weight.shape
            weights[f"base_model.model.{name}.lora_A.weight"] = torch.randn(8, d_in)
            weights[f"base_model.model.{name}.lora_B.weight"] = torch.randn(d_out, 8)
    write_gguf(tmp_path / "x.gguf", model, 8, weights)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == ("llama" if permuted else family)
    assert (fields["general.type"], fields["adapter.type"], fields["adapter.lora.alpha"]) == ("adapter", "lora", 8.0)
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == len(weights)
    for layer in range(2):
        for module, short in NAMES.items():
            for part in "AB":
                tensor = found[f"blk.{layer}.{short}.weight.lora_{part.lower()}"]
                wanted = weights[f"base_model.model.model.layers.{layer}.{module}.lora_{part}.weight"].numpy()
                if part == "B" and permuted and short in ("attn_q", "attn_k"):
                    head = np.array([0, 3, 1, 4, 2, 5])
                    rows = np.concatenate([6 * i + head for i in range(len(wanted) // 6)])
                    wanted = wanted[rows]
                assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
                np.testing.assert_array_equal(tensor.data, wanted)


def test_other_architectures_and_a_missing_package_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        gpt = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    other = type("FalconForCausalLM", (), {"config": gpt.config})()
    with pytest.raises(UserError, match=r"^--for ollama: no GGUF for adapters of FalconForCausalLM; expected LlamaFor"):
        check_gguf(other, "ollama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"^--for llama.cpp: the package gguf is not installed; install it by pip "):
        check_gguf(gpt, "llama.cpp")
