"""Whole runs in which one rank runs out of memory: they end as runs that had the smaller micro-batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
from helpers.tiny_run import run_settings
from sparse_llm_ft.checkpoint.store import newest_valid
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.errors import ConfigError, lacks_device_memory, lacks_host_memory

SELECT = {"name": "weight_lora", "keep": 3, "steps": 5, "cut_after": 2, "batch_growth": "none"}


SMALL, DROPPED = {"micro_batch_size": 1}, {"lora_dropout": 0.3}
Runs = Callable[..., Path]


@pytest.fixture(scope="module")
def run(model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Returns the folder of the runs that have been made, by the names of their worlds, each once."""
    folder, done = tmp_path_factory.mktemp("on-oom"), set()

    def world(name: str, ranks: int, run: str | None = None, starve: list[Any] | None = None, **changes: Any) -> Any:
        tree = run_settings(model_folder, data_folder, folder / (run or name))
        tree["training"] |= {"save_every": 3, "on_oom": "shrink"}
        tree["evaluation"] |= {"samples": 0}
        tree["adapter"]["lora_dropout"] = 0.0
        for section, values in changes.items():
            tree[section] = tree.get(section, {}) | values
        before = {} if starve is None else {"before": ["helpers.starving", "starve", *starve]}
        return {"trees": tree, "world_size": ranks} | before

    worlds = {
        # From the start: the order in which a global batch is divided changes sums in their last bits alone.
        "small": world("small", 2, training=SMALL, method=SELECT),
        "stage-0": world("stage-0", 2, starve=[1, "forward", [4]], method=SELECT, deepspeed={"zero_stage": 0}),
        "stage-1": world("stage-1", 2, starve=[0, "backward", [4]], method=SELECT, deepspeed={"zero_stage": 1}),
        "stage-2": world("stage-2", 2, starve=[1, "backward", [4]], method=SELECT, deepspeed={"zero_stage": 2}),
        "small-alone": world("small-alone", 1, training=SMALL),
        "alone": world("alone", 1, starve=[0, "backward", [1, 2]], training={"micro_batch_size": 4}),
        # From the step on: with dropout, bit for bit. Killed before step 4, the run goes on from step 3.
        "killed": world("killed", 2, starve=[1, "forward", [], 1, 4], adapter=DROPPED),
        "smaller": world("smaller", 2, "killed", training=SMALL, adapter=DROPPED),
        "starved": world("starved", 2, starve=[1, "backward", [4], 1, 6], adapter=DROPPED),
        "resumed": world("resumed", 2, "starved", adapter=DROPPED),
        "too-small": world("too-small", 2, starve=[1, "forward", [2], 0], training=SMALL),
    }

    def made(*names: str) -> Path:
        statuses = run_worlds({name: worlds[name] for name in names if name not in done}, folder / "logs", timeout=400)
        for name, status in statuses.items():
            first = {"killed": -9, "starved": -9, "too-small": 2}.get(name, 0)  # then rank 1 is ended
            said = last_lines(folder / "logs" / name)
            assert status and status[0] == first and (first or not any(status)), f"{name}: {status} {said}"
            done.add(name)
        return folder

    return made


def lines(runs: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]


def weights(runs: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(runs / name / "adapter" / "adapter_model.safetensors")


def difference(runs: Path, name: str, other: str) -> float:
    first, second = weights(runs, name), weights(runs, other)
    assert first.keys() == second.keys()
    return max(float((tensor - second[key]).abs().max()) for key, tensor in first.items())


def summary(runs: Path, name: str) -> list[tuple[str, int, int, int, int]]:
    phases = json.loads((runs / name / "summary.json").read_text())["phases"]
    keys = ("name", "micro_batch_size", "global_batch_size", "steps", "out_of_memory")
    return [tuple(phase[key] for key in keys) for phase in phases]


@pytest.mark.parametrize(
    "name",
    [pytest.param("stage-0", marks=pytest.mark.long), pytest.param("stage-1", marks=pytest.mark.long), "stage-2"],
)
def test_two_ranks_end_as_with_the_smaller_micro_batch(run: Runs, name: str) -> None:
    runs = run("small", name)
    assert difference(runs, name, "small") < 1e-6
    assert summary(runs, name) == [("select", 1, 8, 5, 1), ("train", 1, 8, 3, 0)]
    counted = [line.get("out_of_memory", 0) for line in lines(runs, name)]
    assert counted == [0, 0, 0, 1, 1, 0, 0, 0] and not any("skipped" in line for line in lines(runs, name))
    assert [line["samples"] for line in lines(runs, name)] == [line["samples"] for line in lines(runs, "small")]
    log = (runs / "logs" / name / "rank-0.log").read_text()
    assert "step 4 ran out of memory and is made again: micro-batch 2 -> 1, global batch 8" in log
    assert "phase select ran out of memory 1 time and ended with micro-batch 1" in log


def test_one_rank_shrinks_as_often_as_it_must(run: Runs) -> None:
    runs = run("alone", "small-alone")
    assert difference(runs, "alone", "small-alone") < 1e-6
    assert summary(runs, "alone") == [("train", 1, 8, 8, 2)]


@pytest.mark.long
def test_the_step_is_made_with_the_same_samples_and_draws(run: Runs) -> None:
    """Bit for bit what a run gives that is stopped before the step and resumed with the smaller micro-batch."""
    runs = run("killed", "smaller", "starved", "resumed")
    assert difference(runs, "starved", "killed") == 0.0


@pytest.mark.long
def test_a_resumed_run_keeps_the_smaller_micro_batch(run: Runs) -> None:
    runs = run("starved", "resumed")
    assert summary(runs, "starved") == [("train", 1, 8, 8, 1)]
    assert "resuming from step 3" in (runs / "logs" / "resumed" / "rank-0.log").read_text()
    found, _ = newest_valid(runs / "starved" / "checkpoints")
    assert found is not None and found.phase.micro_batch_size == 1


def test_micro_batch_1_is_the_end_in_one_line_on_all_ranks(run: Runs) -> None:
    runs = run("too-small")
    log = (runs / "logs" / "too-small" / "rank-0.log").read_text()
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "training.on_oom: shrink, and step 2 ran out of memory at micro-batch 1" in errors[0]
    assert "gradient_checkpointing" in errors[0] and "Traceback" not in log
    other = (runs / "logs" / "too-small" / "rank-1.log").read_text()
    assert "error: " not in other and "Traceback" not in other
    found, _ = newest_valid(runs / "too-small" / "checkpoints")
    assert found is not None and found.step == 1


@pytest.mark.parametrize(
    ("section", "value", "reason"),
    [
        ("deepspeed", {"zero_stage": 3}, "zero_stage is 3"),
        ("training", {"prefix_cache": "disk"}, "prefix_cache is disk"),
    ],
)
def test_where_passes_contain_collectives_it_is_refused(settings: dict, section: str, value: dict, reason: str) -> None:
    settings[section] = settings.get(section, {}) | value
    parse_config(settings)
    settings["training"]["on_oom"] = "shrink"
    with pytest.raises(ConfigError, match=rf"^training.on_oom: shrink, but .*{reason}.*; expected error, or"):
        parse_config(settings)


def test_a_failed_allocation_is_known_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**50, dtype=torch.uint8)
    assert lacks_host_memory(found.value) and not lacks_device_memory(found.value)
    with pytest.raises(RuntimeError) as found:
        torch.ones(2) @ torch.ones(3)
    assert not lacks_host_memory(found.value) and not lacks_device_memory(found.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("of a GPU"),
        torch.AcceleratorError("CUDA error: out of memory", 2),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_a_gpus_lack_of_memory_has_several_names(error: RuntimeError) -> None:
    """The allocator is not the only one that allocates: handles, workspaces and kernels do, too."""
    assert lacks_device_memory(error)
