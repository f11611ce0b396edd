"""benchmarks/planner_tables.py: what it computes from few traces is what a run of each size would be told."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import planner_tables

from sparse_llm_ft.config import merge, parse_config
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.planning.forecast import forecast
from sparse_llm_ft.planning.opening import open_for_planning
from sparse_llm_ft.planning.samples import SampleSizes


@pytest.mark.parametrize("stage", [0, 3])
def test_a_context_that_serves_all_sizes_says_the_same_as_one_of_its_own(stage: int, model_folder: Path) -> None:
    shared = planner_tables.opened(str(model_folder), "lora", "nf4")
    found = planner_tables.forecasts(str(model_folder), "lora", "nf4", stage, 24, ranks=4, batch=8)
    changes = {
        "task": {"max_length": 24},
        "training": {"global_batch_size": 8},
        "deepspeed": {"zero_stage": stage},
    }
    config = parse_config(merge(shared.config.model_dump(mode="json"), changes))
    own = open_for_planning(config, World(0, 4, 0, 4))
    assert found == forecast(own, samples=replace(SampleSizes.assumed(24), equal=True))
    assert found.world_size == 4 and found.phases[0].accumulation_steps == 2


def test_cells_have_a_number_for_each_size_and_phase_that_differs(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"name": "weight_lora", "keep": 3, "steps": 10, "batch_growth": "none"}
    monkeypatch.setattr(planner_tables, "METHODS", {"weight_lora": method})
    monkeypatch.setattr(planner_tables, "SCALED", ("weight_lora",))
    monkeypatch.setattr(planner_tables, "MANY", (2, 8))
    planner_tables.opened.cache_clear()

    def tables() -> list[list[str]]:
        own = planner_tables.Tables("tiny", str(model_folder), [2], planner_tables.Store(tmp_path / "store"))
        return [text.splitlines() for text in (own.by_length([24]), own.scaling(length=24))]

    lengths, many = tables()
    assert lengths[0] == "| method | base | ZeRO | 24 tokens |" and len(lengths) == 4
    assert lengths[2].startswith("| weight_lora | bf16 | 2 | 0.5 / 1.0")
    assert len(many) == 4 and "2 / 8 GPUs, GiB" in many[0] and " → " in many[2].split("|")[5]

    def again(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(planner_tables, "forecasts", again)
    assert tables() == [lengths, many]
    planner_tables.opened.cache_clear()
