"""A base that is stored in 4 bit runs in its own form, which every record names; other forms are one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from helpers.contexts import open_context
from helpers.trained_runs import PLANS, make_run
from sparse_llm_ft.cli.main import main
from sparse_llm_ft.config import merge, parse_config
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.export.export import export_run
from sparse_llm_ft.export.options import ExportOptions
from sparse_llm_ft.inference.trained_run import load_trained, read_run
from sparse_llm_ft.model.loading import find_quantization, load_model
from sparse_llm_ft.run_folder import RunFolder
from sparse_llm_ft.training.run import Run

IDS = torch.tensor([[1, 5, 9, 12, 7, 3]])


def stored(model_folder: Path, folder: Path, kind: str, **options: Any) -> Path:
    """The tiny Llama, stored as its makers would: with their own compute type and storage."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.bfloat16, **options
    )
    model = AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def nf4_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(model_folder, tmp_path_factory.mktemp("stored") / "nf4", "nf4", bnb_4bit_use_double_quant=True)


def config(settings: dict, folder: Path, **changes: Any) -> Any:
    return parse_config(merge(settings, {"model": {"name": str(folder)} | changes}))


@pytest.mark.parametrize("asked", ["none", "nf4"])
def test_what_is_stored_runs_and_is_recorded(asked: str, settings: dict, nf4_folder: Path) -> None:
    run = Run.prepare(open_context(config(settings, nf4_folder, quantization=asked)))
    assert run.config.model.quantization == run.context.config.model.quantization == "nf4"


@pytest.mark.parametrize("asked", ["nf4", "fp4"])
def test_another_form_than_the_stored_one_is_refused(
    asked: str, settings: dict, model_folder: Path, tmp_path: Path
) -> None:
    kind = {"nf4": "fp4", "fp4": "nf4"}[asked]
    folder = stored(model_folder, tmp_path / kind, kind)
    with pytest.raises(ConfigError, match=f"model.quantization: {asked}, but .* is stored in {kind}; expected {kind}"):
        open_context(config(settings, folder, quantization=asked))


def test_full_cannot_train_what_is_stored_in_four_bits(settings: dict, nf4_folder: Path) -> None:
    settings["method"] = {"name": "full"}
    with pytest.raises(ConfigError, match=r"method.name: full cannot train a base in nf4"):
        open_context(config(settings, nf4_folder))


FORMS: dict[str, dict[str, Any]] = {
    "8 bit by bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8"},
    "mxfp4": {"quant_method": "mxfp4"},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "own": {"quant_method": "own"},
}


@pytest.mark.parametrize("form", FORMS)
def test_other_stored_forms_are_refused(form: str, settings: dict, model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(model_folder, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": FORMS[form]}))
    with pytest.raises(ConfigError, match=f"^model.name: .* is stored in {form}; expected a base in 16 or 32 bit, or"):
        open_context(config(settings, folder))


@torch.no_grad()
def test_it_computes_in_the_runs_own_type(settings: dict, nf4_folder: Path) -> None:
    model = config(settings, nf4_folder).model
    ours = load_model(find_quantization(model)).eval()
    layer = ours.model.layers[0].mlp.down_proj
    assert layer.weight.quant_state.quant_type == "nf4"
    ours(input_ids=IDS)
    assert layer.compute_dtype == torch.float32
    stock = AutoModelForCausalLM.from_pretrained(nf4_folder, dtype=torch.float32).dequantize().eval()
    torch.testing.assert_close(ours(input_ids=IDS).logits, stock(input_ids=IDS).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_it_is_merged_as_training_saw_it(settings: dict, nf4_folder: Path, tmp_path: Path) -> None:
    resolved = merge(settings, {"model": {"name": str(nf4_folder), "quantization": "nf4"}})
    make_run(resolved, PLANS["lora"])
    run = read_run(resolved["output_dir"])
    seen = load_trained(run)(input_ids=IDS).logits
    export_run(run, tmp_path / "merged", ExportOptions(to="merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    torch.testing.assert_close(merged(input_ids=IDS).logits, seen, rtol=0, atol=1e-4)


def test_a_head_on_it_stays_whole(settings: dict, nf4_folder: Path) -> None:
    model = find_quantization(config(settings, nf4_folder).model)
    loaded = load_model(model, TaskMode("sequence_classification", 3))
    assert type(loaded).__name__ == "LlamaForSequenceClassification"
    assert type(loaded.score) is torch.nn.Linear and loaded.score.weight.shape == (3, 16)
    assert type(loaded.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    assert AutoModelForSequenceClassification  # its class, not that of the stored config


def test_a_run_in_it_resumes_with_the_settings_as_typed(settings: dict, nf4_folder: Path, tmp_path: Path) -> None:
    """config.yaml says nf4; the user's file says none, which is the same run here, but not on a plain base."""
    typed = config(settings, nf4_folder)
    folder = RunFolder(typed.output_dir)
    run = Run.prepare(open_context(typed))
    folder.path.mkdir()
    folder.begin(run.config, 0)
    assert yaml.safe_load((folder.path / "config.yaml").read_text())["model"]["quantization"] == "nf4"
    Run.prepare(open_context(typed))
    plain = tmp_path / "plain"
    shutil.copytree(nf4_folder, plain)
    folder.check(typed)
    with pytest.raises(ConfigError, match=r"holds another run .model.quantization: 'nf4' there, 'none' here"):
        folder.check(typed, resolved=True)


def test_check_refuses_it_too(settings: dict, nf4_folder: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(merge(settings, {"model": {"name": str(nf4_folder), "quantization": "fp4"}})))
    with pytest.raises(SystemExit):
        main(["check", "--config", str(path)])
    assert "is stored in nf4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        (
            {"bnb_4bit_quant_type": "nf4"},
            "is stored in 4 bit, says its config.json, but model.layers.0.self_attn.q_proj",
        ),
        ({"bnb_4bit_quant_type": "int4"}, "is stored in int4; expected nf4 or fp4"),
        (
            {"load_in_4bit": "yes"},
            "quantization_config that bitsandbytes does not take .load_in_4bit must be a boolean",
        ),
        ({"bnb_4bit_compute_dtype": "half16"}, "quantization_config that bitsandbytes does not take .*'half16'"),
    ],
)
def test_a_wrong_claim_of_four_bits_is_one_line(
    claim: dict, message: str, settings: dict, model_folder: Path, tmp_path: Path
) -> None:
    """Such as plain weights that were saved with the config of the quantised base."""
    shutil.copytree(model_folder, tmp_path / "claims")
    path = tmp_path / "claims" / "config.json"
    claimed = {"quant_method": "bitsandbytes", "load_in_4bit": True} | claim
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": claimed}))
    with pytest.raises(ConfigError, match=rf"^model\.name: .*{message}"):
        load_model(find_quantization(config(settings, tmp_path / "claims").model))
