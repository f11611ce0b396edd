"""Files of configs/ as whole runs, on tiny random models of their families: every method, base and ZeRO stage."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.families import Tree, files, layered, make_tiny
from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
from sparse_llm_ft.config import merge, parse_config

STEPS = 4
RUNS = [
    *(("llama-3-8b", method, "zero2") for method in files("methods")),
    *(("llama-2-7b", method, "zero1") for method in ("lora_drop", "weight_lora_plus")),
    *(("mistral-7b", method, "zero3") for method in ("partial_lora", "weight_lora_plus")),
    *(("qwen2.5-7b", method, "zero2-offload") for method in ("lora_drop_then_partial", "weight_lora_plus")),
    *(("qwen2.5-tied", method, "zero2") for method in ("lora", "full")),
    ("llama-3-8b-nf4", "weight_lora_plus", "zero2"),
    ("mistral-7b-nf4", "lora", "zero3-offload"),
]
NAMES = ["-".join(run) for run in RUNS]
FIRST = {
    "llama-3-8b-partial_lora-zero2",
    "mistral-7b-weight_lora_plus-zero3",
    "qwen2.5-7b-lora_drop_then_partial-zero2-offload",
    "qwen2.5-tied-lora-zero2",
    "llama-3-8b-nf4-weight_lora_plus-zero2",
    "mistral-7b-nf4-lora-zero3-offload",
}
"""Those of `make test`; the others are long."""


def cases(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in FIRST else pytest.mark.long) for name in names]


SMALLER = {
    "weight_lora": {"keep": 4, "steps": 2, "cut_after": 1},
    "weight_lora_plus": {"keep": 4, "steps": 2, "cut_after": 1},
    "partial_lora": {"shots": 6, "floor_metric": "loss"},
    "sparse_adapter": {"shots": 6},
    "lora_drop": {"sample_fraction": 0.3, "pilot_epochs": 1},
}
"""What a model of 14 adapters, 40 samples and nothing learnt needs; the rest is as the file has it."""


def smaller(method: Any, cache: Path) -> Any:
    """The method section with less of what costs time, or cannot be with so few adapters."""
    if isinstance(method, list):
        return [smaller(part, cache) for part in method]
    derives = method["name"] in ("partial_lora", "sparse_adapter")
    return method | SMALLER.get(method["name"], {}) | ({"cache_dir": str(cache)} if derives else {})


def run_tree(run: tuple[str, str, str], models: Path, data: Path, folder: Path) -> dict[str, Any]:
    """The three files, the task's data replaced by a tiny one, and `STEPS` optimizer steps."""
    model, method, zero = run
    name = model.removesuffix("-nf4")
    base: Tree = files("models")[model.replace("-tied", "-7b")]
    tree = layered(base, files("methods")[method], files("deepspeed")[zero])
    tree["method"] = smaller(tree["method"], folder / "cache")
    task = {
        "name": "custom", "path": str(data), "max_length": 32, "prompt": "{text} ?", "completion": "{answer}"
    }  # fmt: skip
    return merge(
        tree,
        {
            "model": {"name": str(models / name)},
            "task": task,
            "training": {"micro_batch_size": 2, "global_batch_size": 4, "max_steps": STEPS},
            "evaluation": {"samples": 2, "max_new_tokens": 2},
            "report": False,
            "output_dir": str(folder / "-".join(run)),
        },
    )


@pytest.fixture(scope="module")
def trees(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder, models = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("models")
    for name in {model.removesuffix("-nf4") for model, _, _ in RUNS}:
        tied = {"tie_word_embeddings": True} if name == "qwen2.5-tied" else {}  # as in its models up to 3B
        make_tiny(name.replace("-tied", "-7b"), models / name, **tied)
    return {name: run_tree(run, models, data_folder, folder) for name, run in zip(NAMES, RUNS, strict=True)}


@pytest.fixture(scope="module")
def statuses(
    trees: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, dict]:
    """All runs that are asked for, one after the other; where their logs are, and how they ended."""
    logs = tmp_path_factory.mktemp("logs")
    items: list[Any] = request.session.items
    asked = {item.callspec.params.get("name") for item in items if item.path == request.path}
    worlds = {name: {"trees": tree, "world_size": 1} for name, tree in trees.items() if name in asked}
    return logs, run_worlds(worlds, logs)


@pytest.mark.parametrize("name", cases(NAMES))
def test_it_trains_what_its_files_say(name: str, trees: dict, statuses: tuple[Path, dict]) -> None:
    logs, ended = statuses
    assert ended[name] == [0], last_lines(logs / name)
    folder = Path(trees[name]["output_dir"])
    assert parse_config(yaml.safe_load((folder / "config.yaml").read_text())) == parse_config(trees[name])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["phases"][-1]["trainable_parameters"] > 0
    assert math.isfinite(summary["metrics"]["after"]["loss"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) >= STEPS and all(math.isfinite(loss) for loss in losses)
    exported = folder / ("model" if "full" in name else "adapter")
    assert list(exported.glob("*.safetensors"))


@pytest.mark.parametrize("name", cases([name for name in NAMES if "weight_lora" in name]))
def test_weight_lora_keeps_as_many_adapters_as_asked_for(name: str, trees: dict, statuses: tuple[Path, dict]) -> None:
    logs, ended = statuses
    assert ended[name] == [0], last_lines(logs / name)
    plan = json.loads((Path(trees[name]["output_dir"]) / "plan.json").read_text())
    assert sum(module is not None for module in plan["modules"].values()) == 4
