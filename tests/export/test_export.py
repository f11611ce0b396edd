"""What export writes computes what the trained model computed, in every form, by stock libraries alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import sparse_llm_ft.adapters  # noqa: F401  (registers the tuner of native exports)
from helpers.trained_runs import PLANS, make_run
from sparse_llm_ft.adapters.tuners import native_plan
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.export.export import export_run, write_output
from sparse_llm_ft.export.merge import merge_adapters
from sparse_llm_ft.export.options import ExportOptions
from sparse_llm_ft.inference.trained_run import load_trained, read_run

IDS = torch.tensor([[1, 5, 9, 12, 7, 3], [1, 4, 4, 20, 11, 8]])
ADAPTERS = [name for name in PLANS if name != "full"]
LORAS = ["lora", "rslora", "masked", "masked_in_optimizer", "ranked", "grouped"]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-5 of the largest logit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def exported(settings: dict, plan: Any, folder: Path, **options: Any) -> tuple[torch.Tensor, Path]:
    """Logits of the trained model, and the folder of its export."""
    expected = logits(make_run(settings, plan))
    export_run(read_run(settings["output_dir"]), folder, ExportOptions(**options))
    return expected, folder


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_loads_the_adapter(name: str, settings: dict, loud_folder: Path, tmp_path: Path) -> None:
    expected, folder = exported(settings, PLANS[name], tmp_path / "out", to="peft")
    base = AutoModelForCausalLM.from_pretrained(loud_folder, dtype=torch.float32)
    before = logits(base)
    close(logits(PeftModel.from_pretrained(base, folder)), expected)
    assert (before - expected).abs().max() > 1e-2, "the adapters change something"


@pytest.mark.parametrize("name", PLANS)
def test_transformers_alone_loads_the_merged_model(name: str, settings: dict, tmp_path: Path) -> None:
    expected, folder = exported(settings, PLANS[name], tmp_path / "out", to="merged")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.config.use_cache is True
    close(logits(model), expected)
    assert AutoTokenizer.from_pretrained(folder)("tom meets")["input_ids"]
    assert {"model.safetensors", "config.json", "generation_config.json", "manifest.json"} <= {
        path.name for path in folder.iterdir()
    }


@pytest.mark.parametrize("name", LORAS)
def test_this_package_loads_its_native_form_which_is_as_small_as_the_checkpoint(
    name: str, settings: dict, loud_folder: Path, tmp_path: Path
) -> None:
    expected, folder = exported(settings, PLANS[name], tmp_path / "out", to="native")
    base = AutoModelForCausalLM.from_pretrained(loud_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder)
    close(logits(model), expected)
    state = read_run(settings["output_dir"]).state
    stored = load_file(folder / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(t.numel() for t in state.tensors.values())
    plan = model.peft_config["default"].plan
    assert plan == native_plan(PLANS[name]) and plan.groups == PLANS[name].groups and plan.masking == "compact"


@pytest.mark.parametrize("name", LORAS)
@pytest.mark.parametrize("patterns", [False, True])
def test_one_rank_for_all_or_patterns_give_the_trained_models_logits(
    name: str, patterns: bool, settings: dict, loud_folder: Path, tmp_path: Path
) -> None:
    expected, folder = exported(settings, PLANS[name], tmp_path / "out", patterns=patterns)
    config = json.loads((folder / "adapter_config.json").read_text())
    ranks = {t.shape[0] for key, t in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in key}
    if patterns:
        assert ranks == {adapter.r for adapter in PLANS[name].active.values()}
        assert config.get("use_rslora", False) == (name == "rslora")
    else:
        assert ranks == {8} and (config["r"], config["lora_alpha"]) == (8, 8)
        assert type(config["lora_alpha"]) is int and "use_rslora" not in config
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
    base = AutoModelForCausalLM.from_pretrained(loud_folder, dtype=torch.float32)
    difference = (logits(PeftModel.from_pretrained(base, folder)) - expected).abs().max()
    assert difference <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("to", ["peft", "merged", "native"])
def test_the_head_of_an_encoder_comes_along(
    to: str, settings: dict, encoder_folder: Path, labelled_folder: Path, tmp_path: Path
) -> None:
    settings["model"]["name"] = str(encoder_folder)
    settings["task"] = {"name": "custom", "path": str(labelled_folder), "labels": ["no", "yes"], "texts": ["sentence"]}
    expected, folder = exported(settings, None, tmp_path / "out", to=to)
    if to == "merged":
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(folder)
        assert model.config.id2label == {0: "no", 1: "yes"}
    else:
        torch.manual_seed(5)  # another fresh head
        base = AutoModelForSequenceClassification.from_pretrained(encoder_folder, num_labels=2)
        assert (logits(base) - expected).abs().max() > 1e-2
        model = PeftModel.from_pretrained(base, folder)
    close(logits(model), expected)


def test_shards_are_no_larger_than_asked(settings: dict, tmp_path: Path) -> None:
    expected, folder = exported(settings, PLANS["lora"], tmp_path / "out", to="merged", max_shard_size="6KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and (folder / "model.safetensors.index.json").is_file()
    assert all(path.stat().st_size < 6000 + 2000 for path in shards)  # tensors and the header
    close(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)


def test_tied_embeddings_stay_tied(settings: dict, loud_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(loud_folder)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(loud_folder).save_pretrained(tmp_path / "tied")
    settings["model"]["name"] = str(tmp_path / "tied")
    for name in ("lora", "full"):
        settings["output_dir"] = str(tmp_path / f"run-{name}")
        expected, folder = exported(settings, PLANS[name], tmp_path / f"out-{name}", to="merged")
        assert "lm_head.weight" not in load_file(folder / "model.safetensors")
        merged = AutoModelForCausalLM.from_pretrained(folder)
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
        close(logits(merged), expected)


@pytest.mark.parametrize("name", ["ranked", "dora", "vera"])
def test_a_quantised_base_is_merged_as_training_saw_it(
    name: str, settings: dict, loud_folder: Path, tmp_path: Path
) -> None:
    """Logits within bfloat16 of those of the nf4 base with adapters; other weights are the dequantised ones."""
    settings["model"] |= {"quantization": "nf4", "dtype": "bfloat16"}
    expected, folder = exported(settings, PLANS[name], tmp_path / "out", to="merged")
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert merged.dtype == torch.bfloat16
    step = float(expected.abs().max()) * 2**-7  # bfloat16 has 8 bits
    assert (logits(merged) - expected).abs().max() < 4 * step
    plain = AutoModelForCausalLM.from_pretrained(loud_folder, dtype=torch.bfloat16)
    untouched = "model.layers.1.self_attn.v_proj"
    quantised = load_trained(read_run(settings["output_dir"]), dequantize=True)
    assert torch.equal(
        merged.get_submodule(untouched).weight, quantised.get_base_model().get_submodule(untouched).weight
    )
    assert not torch.equal(merged.get_submodule(untouched).weight, plain.get_submodule(untouched).weight)


def test_a_merged_weight_is_rounded_once(settings: dict) -> None:
    """In bfloat16: round(W + s B A), computed here from the checkpoint's own tensors."""
    settings["model"]["dtype"] = "bfloat16"
    make_run(settings, PLANS["lora"])
    run = read_run(settings["output_dir"])
    name, tensors = "model.layers.0.self_attn.q_proj", run.state.tensors
    before = load_trained(run).get_base_model().get_submodule(name).base_layer.weight.clone()
    after = merge_adapters(load_trained(run)).get_submodule(name).weight
    delta = 2.0 * tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"]
    assert torch.equal(after, (before.float() + delta).bfloat16())


def test_a_quantised_layer_is_not_merged_into(settings: dict) -> None:
    settings["model"] |= {"quantization": "nf4", "dtype": "bfloat16"}
    make_run(settings, PLANS["lora"])
    with pytest.raises(ValueError, match="is quantised"):
        merge_adapters(load_trained(read_run(settings["output_dir"])))


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        ("full", {"to": "peft"}, "--to peft: .* trained the whole model"),
        ("full", {"to": "native"}, "--to native: .* trained the whole model"),
        ("dora", {"to": "native"}, "PEFT's own tuner dora; use --to peft"),
        ("vera", {"rank": 8}, "--rank 8: .* trained with tuner vera, which servers do not load; use --to merged"),
        ("dora", {"server": "vllm"}, "--for vllm: .* trained with tuner dora, which servers do not load"),
    ],
)
def test_a_form_that_a_run_has_not_is_refused(
    plan: str, options: dict, message: str, settings: dict, tmp_path: Path
) -> None:
    make_run(settings, PLANS[plan])
    with pytest.raises(UserError, match=message):
        export_run(read_run(settings["output_dir"]), tmp_path / "out", ExportOptions(**options))
    assert not (tmp_path / "out").exists()


def test_the_newest_checkpoint_that_can_be_used_is_taken(settings: dict, tmp_path: Path) -> None:
    make_run(settings, PLANS["lora"], step=4)
    make_run(settings, PLANS["lora"], step=8)
    checkpoint = Path(settings["output_dir"]) / "checkpoints" / "step-00000008" / "tensors.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    run = read_run(settings["output_dir"])
    assert run.state.progress.step == 4
    assert len(run.complaints) == 1 and "step-00000008" in run.complaints[0]


def test_what_appears_at_the_output_meanwhile_stays_and_is_one_line(tmp_path: Path) -> None:
    output = tmp_path / "export"

    def fill(folder: Path) -> None:
        (folder / "ours").touch()
        output.mkdir()
        (output / "notes.txt").write_text("a user's")

    with pytest.raises(UserError, match=r"export: exists; choose a new folder"):
        write_output(output, fill)
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
