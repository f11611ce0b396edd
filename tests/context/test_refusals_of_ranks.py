"""On two ranks a refusal is one line, from rank 0 alone, wherever in the start-up it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from context.test_refusals import BAD

from helpers.fork_server import run_worlds
from sparse_llm_ft.config import merge

pytestmark = pytest.mark.distributed
ALONE: dict[str, tuple[dict[str, Any], str]] = {
    "key": ({"training": {"learning_rat": 1}}, "training.learning_rat: unknown key"),
    "batch": ({"training": {"global_batch_size": 2}}, "training.global_batch_size: 2 is not a multiple of"),
    "folder": ({"task": {"path": "/nowhere"}}, "task.path: '/nowhere' is not a folder"),
    "column": ({"task": {"prompt": "{nothing}"}}, "nothing"),
    "key of stage 3": (
        {"deepspeed": {"zero_stage": 3, "zero_optimization": {"stage3_prefetch_bucket": 1}}},
        "deepspeed.zero_optimization.stage3_prefetch_bucket: unknown key",
    ),
    "rows": ({"task": {"max_length": 2}}, "task.max_length"),
    "steps": ({"method": {"name": "weight_lora", "keep": 2, "steps": 99}}, "method.steps"),
}
REFUSALS = BAD | ALONE


def check(names: list[str], settings: dict, folder: Path) -> None:
    """Start each on two ranks; what both print together is the line."""
    worlds = {}
    for name in names:
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(merge(settings, REFUSALS[name][0])))
        worlds[name] = {"trees": {"command": ["train", "--config", str(config)]}, "world_size": 2}
    statuses = run_worlds(worlds, folder)
    for name in names:
        printed = [(folder / name / f"rank-{rank}.log").read_text() for rank in (0, 1)]
        assert statuses[name][0] == 2, (name, printed)
        assert printed[1] == "" and printed[0].startswith("error: ") and printed[0].count("\n") == 1, (name, printed)
        assert REFUSALS[name][1] in printed[0], (name, printed)


def test_one_of_each_place(settings: dict, tmp_path: Path) -> None:
    """In the settings, in the opening, and with the ranks connected."""
    check(["key", "key of stage 3", "rows"], settings, tmp_path)


@pytest.mark.long
def test_all(settings: dict, tmp_path: Path) -> None:
    check(list(REFUSALS), settings, tmp_path)
