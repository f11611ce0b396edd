"""What one command refuses before weights are loaded, every command refuses, in the same words."""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from helpers.contexts import open_context
from helpers.trained_runs import PLANS, make_run
from sparse_llm_ft.cli.main import main
from sparse_llm_ft.config import merge, parse_config
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.training.run import Run

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "value of DeepSpeed": (
        {"deepspeed": {"zero_optimization": {"reduce_bucket_size": "big"}}},
        "deepspeed.zero_optimization.reduce_bucket_size: 'big' is not allowed",
    ),
    "key of DeepSpeed": (
        {"deepspeed": {"zero_optimization": {"reduce_buckets": 1}}},
        "deepspeed.zero_optimization.reduce_buckets: unknown key",
    ),
    "attention": ({"model": {"attn_implementation": "flash_9"}}, "model.attn_implementation: 'flash_9' cannot be used"),
    "targets": ({"adapter": {"target_modules": ["nope"]}}, "adapter.target_modules: 'nope' matches no linear layer"),
    "mode": ({"task": {"mode": "seq2seq_lm"}}, "task.mode: seq2seq_lm, but"),
    "positions": ({"task": {"max_length": 100_000}}, "task.max_length: 100000, but"),
    "packing": ({"task": {"packing": True, "mode": "seq2seq_lm"}}, "task.packing: true, and task.mode is seq2seq_lm"),
    "rate of a head": (
        {"training": {"head_learning_rate": 0.1}},
        "training.head_learning_rate: has no effect where nothing is trained whole beside the adapters",
    ),
    "budget of arithmetic": (
        {"method": [{"name": "weight_lora", "keep": 2, "steps": 2, "choose": "cost", "budget": 0.1}]},
        "method.budget: 0.1 of a step with all adapters leaves room for no adapter; expected 0.",
    ),
    "prefix cache below trained embeddings": (
        {"training": {"prefix_cache": "memory"}, "adapter": {"modules_to_save": ["embed_tokens"]}},
        "training.prefix_cache: memory, but model.embed_tokens is trained, which may lie below the layers",
    ),
    "prefix cache of changing tokens": (
        {"training": {"prefix_cache": "disk"}, "deepspeed": {"data_efficiency": {"enabled": True}}},
        "training.prefix_cache: disk, but deepspeed.data_efficiency changes what the lower layers compute",
    ),
    "compiling at ZeRO-3": (
        {"training": {"compile": "layers"}, "deepspeed": {"zero_stage": 3}, "adapter": {"lora_dropout": 0.0}},
        "training.compile: layers, but deepspeed.zero_stage is 3; expected off",
    ),
    "compiling 4 bit": (
        {"training": {"compile": "layers"}, "model": {"quantization": "nf4"}, "adapter": {"lora_dropout": 0.0}},
        "training.compile: layers, but model.quantization is nf4; expected off",
    ),
    "compiling above a prefix cache": (
        {"training": {"compile": "layers", "prefix_cache": "memory"}, "adapter": {"lora_dropout": 0.0}},
        "training.compile: layers, but training.prefix_cache is memory; expected off",
    ),
    "compiling dropout": (
        {"training": {"compile": "layers"}, "adapter": {"lora_dropout": 0.1}},
        "training.compile: layers, but adapter.lora_dropout is 0.1; expected off",
    ),
    "everything whole": (
        {"adapter": {"modules_to_save": ["model"]}},
        "adapter.modules_to_save: model has every module that would get an adapter; expected fewer",
    ),
    "temperature": ({"evaluation": {"temperature": 1.0, "num_beams": 2}}, "evaluation.temperature: 1.0 samples"),
}


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with status 2 and one line."""
    try:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
    finally:
        if dist.is_initialized():  # as it was when the command was refused
            dist.destroy_process_group()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(lines) == 1 and message in lines[0], lines


@pytest.fixture
def derived(settings: dict) -> dict:
    """Settings that `derive` takes."""
    return settings | {"method": {"name": "partial_lora", "shots": 2}}


@pytest.mark.parametrize("name", BAD)
def test_train_check_and_derive_refuse_the_same(derived: dict, tmp_path: Path, capsys, name: str) -> None:
    changes, message = BAD[name]
    tree = merge(derived, changes)
    with pytest.raises(ConfigError) as error:
        Run.prepare(open_context(parse_config(tree)))
    assert message in str(error.value)
    config = tmp_path / "bad.yaml"
    config.write_text(yaml.safe_dump(tree))
    for command in ("check", "derive"):
        refused([command, "--config", str(config)], message, capsys)


@pytest.mark.parametrize("name", BAD)
def test_evaluate_refuses_the_same(settings: dict, capsys, name: str) -> None:
    changes, message = BAD[name]
    make_run(deepcopy(settings), PLANS["lora"])
    stored = Path(settings["output_dir"]) / "config.yaml"
    stored.write_text(yaml.safe_dump(merge(yaml.safe_load(stored.read_text()), changes)))
    refused(["evaluate", settings["output_dir"]], message, capsys)


def test_a_base_without_weights_is_refused_where_they_are_needed(derived: dict, tmp_path: Path, capsys) -> None:
    """An adapter is exported without them."""
    make_run(deepcopy(derived), PLANS["lora"])
    base = tmp_path / "base"
    shutil.copytree(derived["model"]["name"], base, ignore=shutil.ignore_patterns("*.safetensors"))
    config = tmp_path / "bad.yaml"
    config.write_text(yaml.safe_dump(merge(derived, {"model": {"name": str(base)}, "output_dir": str(tmp_path / "b")})))
    for command in ("check", "derive"):
        refused([command, "--config", str(config)], "has no weights", capsys)
    for weights in Path(derived["model"]["name"]).glob("*.safetensors"):
        shutil.move(weights, tmp_path / weights.name)
    try:
        refused(["evaluate", derived["output_dir"]], "has no weights", capsys)
        main(["export", derived["output_dir"], "--output", str(tmp_path / "adapter")])
    finally:
        for weights in tmp_path.glob("*.safetensors"):
            shutil.move(weights, Path(derived["model"]["name"]) / weights.name)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_foreign_run_folder_runs_no_code(settings: dict, capsys) -> None:
    """Its config.yaml cannot allow the base's own code; only who types the command can."""
    make_run(deepcopy(settings), PLANS["lora"])
    stored = Path(settings["output_dir"]) / "config.yaml"
    stored.write_text(yaml.safe_dump(merge(yaml.safe_load(stored.read_text()), {"model": {"trust_remote_code": True}})))
    for command in (["evaluate"], ["generate"], ["export"], ["push"]):
        extra = {"generate": ["anna"], "push": ["me/tiny", "--dry-run"]}.get(command[0], [])
        refused([*command, settings["output_dir"], *extra], "give --trust-remote-code if you trust it", capsys)
