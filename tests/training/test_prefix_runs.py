"""Whole runs with a prefix cache: killed and resumed, packed, on disk, and across a change of plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
from helpers.tiny_run import run_settings

UPPER = r".*\.layers\.1\..*"
STEPS = 14  # of 8 samples; an epoch has 40


@pytest.fixture(scope="module")
def runs(model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs, by the names of their worlds."""
    folder = tmp_path_factory.mktemp("prefix-runs")
    for name in ("watched", "cache"):
        (folder / name).mkdir()

    def world(name: str, cache: str, run: str | None = None, **changes: Any) -> dict[str, Any]:
        tree = run_settings(model_folder, data_folder, folder / (run or name))
        tree["training"] |= {"max_steps": STEPS, "save_every": 3, "prefix_cache": cache}
        tree["adapter"]["target_modules"] = UPPER
        tree["evaluation"] |= {"samples": 0}
        for section, values in changes.items():
            tree[section] |= values
        return {"trees": tree, "world_size": 1}

    packed, training = {"packing": True}, {"max_steps": STEPS, "global_batch_size": 4}
    kill = {"before": ["helpers.watching", "watch", str(folder / "watched"), 10]}
    # With this seed, both survivors are in the upper layer.
    select = {"name": "weight_lora", "keep": 2, "steps": 2, "choose": "random"}
    worlds = {
        "plain": world("plain", "off"),
        "killed": world("killed", "disk") | kill,
        "resumed": world("resumed", "memory", "killed"),
        "packed": world("packed", "off", task=packed, training=training),
        "packed-disk": world("packed-disk", "disk", task=packed, training=training | {"prefix_cache": "disk"}),
        "two-phases": world("two-phases", "memory", method=select, adapter={"target_modules": "all-linear"}),
    }
    worlds["two-phases"]["trees"]["seed"] = 6
    statuses = run_worlds(worlds, folder / "logs", timeout=400)
    for name, status in statuses.items():
        assert status == ([-9] if name == "killed" else [0]), f"{name}: {last_lines(folder / 'logs' / name)}"
    return folder


def lines(runs: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected) == STEPS
    for ours, plain in zip(found, expected, strict=True):
        assert abs(ours["loss"] - plain["loss"]) <= 1e-6 * plain["loss"]


def test_a_resumed_run_has_the_losses_of_one_without(runs: Path) -> None:
    plain, resumed = lines(runs, "plain"), lines(runs, "killed")
    same(resumed, plain)
    assert all("cached_samples" not in line for line in plain)
    # Killed in step 10 and continued from step 9, where at most one epoch was left, so that it did not pay.
    assert [line.get("cached_samples") for line in resumed] == [0, 0, 0, 0, 0, 8, 8, 8, 8, *[None] * 5]
    assert "does not pay in phase train: at most one epoch is left" in last_lines(runs / "logs" / "resumed", 10_000)
    assert not (runs / "killed" / "prefix-cache").exists() and not any((runs / "plain").glob("*/prefix*"))


def test_packs_are_cached_as_samples_are(runs: Path) -> None:
    same(lines(runs, "packed-disk"), lines(runs, "packed"))
    assert lines(runs, "packed-disk")[-1]["cached_samples"] == 4
    assert not (runs / "packed-disk" / "prefix-cache").exists()


def test_the_cache_begins_where_the_plan_allows_it(runs: Path) -> None:
    """In the first phase every layer has an adapter; in the second one, the survivors' layers alone."""
    output = last_lines(runs / "logs" / "two-phases", 10_000)
    assert "training.prefix_cache does nothing in phase select: layer 0 has an adapter" in output
    assert "layers 0 to 0 run once for a sample" in output
    assert lines(runs, "two-phases")[-1]["cached_samples"] == 8
