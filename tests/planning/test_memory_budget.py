"""Whole runs under ``method.budget.memory``: phases fit by plan, the first with a smaller micro-batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.contexts import open_context
from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
from helpers.tiny_run import run_settings
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.planning.forecast import budget_peak, forecast
from sparse_llm_ft.planning.opening import open_for_planning
from sparse_llm_ft.training.run import Run

METHODS: dict[str, dict[str, Any]] = {
    "weight_lora": {"keep": 3, "steps": 4, "choose": "cost", "batch_growth": "none"},
    "lora_drop": {"sample_fraction": 0.5, "pilot_epochs": 1},
}


def tree_of(settings: dict[str, Any], method: str, memory: int) -> dict[str, Any]:
    settings["evaluation"] |= {"samples": 0}
    settings["training"] |= {"micro_batch_size": 4, "global_batch_size": 8}
    settings["method"] = {"name": method, **METHODS[method], "budget": {"memory": memory}}
    return settings


def needed(settings: dict[str, Any], layer: str) -> int:
    """Of plain LoRA at micro-batch 4, with adapters as the method has at most from this layer up: three, or all."""
    some = settings["method"]["name"] == "weight_lora"
    layers = f".*layers.{layer}.(self_attn.q_proj|mlp.gate_proj|mlp.up_proj)" if some else f".*layers.[{layer}-1].*"
    settings = settings | {"adapter": settings["adapter"] | {"target_modules": layers}, "method": {"name": "lora"}}
    context = open_context(parse_config(settings))
    Run.prepare(context)  # tokenises: the longest sample is then known
    return forecast(context, on_gpu=False).peak_bytes


@pytest.mark.parametrize("method", list(METHODS))
def test_the_run_fits_into_the_budget(method: str, model_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    settings = run_settings(model_folder, data_folder, tmp_path / "run")
    tree = tree_of(settings, method, 1)
    upper, lower = (needed(tree, layer) for layer in ("1", "0"))
    assert upper < lower
    memory = (upper + lower) // 2
    tree["method"]["budget"]["memory"] = memory
    statuses = run_worlds({"run": {"trees": tree, "world_size": 1}}, tmp_path / "logs", timeout=300)
    assert statuses["run"] == [0], last_lines(tmp_path / "logs" / "run")
    first, last = json.loads((tmp_path / "run" / "summary.json").read_text())["phases"]
    assert first["micro_batch_size"] < 4 == last["micro_batch_size"], "the choice makes room for the given one"
    assert first["global_batch_size"] == last["global_batch_size"] == 8
    modules = json.loads((tmp_path / "run" / "plan.json").read_text())["modules"]
    alive = [name for name, adapter in modules.items() if adapter is not None]
    assert alive and all(".layers.1." in name for name in alive)
    foreseen = forecast(open_for_planning(parse_config(tree), World(0, 1, 0, 1)), on_gpu=False)
    assert [phase.micro_batch_size for phase in foreseen.phases] == [first["micro_batch_size"], 4]
    assert foreseen.fits(memory)


def test_what_no_micro_batch_fits_is_refused(settings: dict) -> None:
    context = open_for_planning(parse_config(tree_of(settings, "weight_lora", 1)), World(0, 1, 0, 1))
    peak = budget_peak(context, on_gpu=False)
    assert peak is not None and peak(Phase("train", context.plan).with_batch(1, 8)) > 1
    with pytest.raises(ConfigError, match=r"^method\.budget: "):
        forecast(context, on_gpu=False)


def test_auto_beside_it_is_refused(settings: dict) -> None:
    tree = tree_of(settings, "lora_drop", 2**30)
    tree["training"]["micro_batch_size"] = "auto"
    with pytest.raises(ConfigError, match=r"^training\.micro_batch_size: auto, and method\.budget limits"):
        parse_config(tree)
