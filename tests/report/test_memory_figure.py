"""Forecast beside fact: what the parts of each bar are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from helpers.run_folders import MIB, weight_lora_plus_run
from sparse_llm_ft.report import RunReport, write_report
from sparse_llm_ft.report.memory_figure import memory_bars


def test_a_process_on_a_cpu(tmp_path: Path) -> None:
    """What it held before it loaded the base is no part of the step, on either side."""
    report = RunReport.read(weight_lora_plus_run(tmp_path / "run", layers=2, planned=True))
    planned, measured, _, last = memory_bars(report)
    assert [bar.label for bar in memory_bars(report)] == [
        "select, forecast", "select, fact", "train, forecast", "train, fact",
    ]  # fmt: skip
    assert planned.parts == (300 * MIB, 2 * MIB, 8 * MIB, 330 * MIB, 200 * MIB) and planned.total == 840 * MIB
    total = report.totals[0]
    held = (300 * MIB, 2 * total["trainable_parameters"], 12 * total["trainable_parameters"])
    assert measured.parts[:3] == held and measured.parts[4] == 200 * MIB
    assert measured.total == 900 * MIB + 60, "the highest of the phase's steps"
    assert last.total == 800 * MIB + 180


def test_a_gpu_has_its_allocators_blocks_beside_tensors(tmp_path: Path) -> None:
    report = RunReport.read(weight_lora_plus_run(tmp_path / "run", layers=2, planned=True))
    steps = [line | {"reserved_memory_bytes": 1000 * MIB} for line in report.steps]
    lines = report.forecast[0]["lines"] | {"device_overhead": 100 * MIB, "optimizer": 0}
    forecast = [report.forecast[0] | {"lines": lines}]
    planned, measured = memory_bars(replace(report, steps=steps, forecast=forecast, process_bytes=0))
    assert planned.parts == (300 * MIB, 2 * MIB, 0, 238 * MIB, 100 * MIB)
    assert measured.total == 1000 * MIB and measured.parts[4] == 100 * MIB - 60
    assert measured.parts[2] == 0, "an offloaded optimizer is not on the device"


def test_a_fact_needs_a_phase_that_came_as_foreseen_and_a_finished_run(tmp_path: Path) -> None:
    folder = weight_lora_plus_run(tmp_path / "run", layers=2, planned=True)
    report = RunReport.read(folder)
    grown = replace(report, totals=[report.totals[0] | {"micro_batch_size": 4}, *report.totals[1:]])
    assert memory_bars(grown)[1].label == "select, fact at micro-batch 4, not 2"
    swapped = replace(report, forecast=report.forecast[::-1])
    assert [bar.label for bar in memory_bars(swapped)] == ["train, forecast", "select, forecast"]
    (folder / "summary.json").unlink()
    assert [bar.label for bar in memory_bars(RunReport.read(folder))] == ["select, forecast", "train, forecast"]
    (folder / "forecast.json").unlink()
    assert memory_bars(RunReport.read(folder)) == []


def test_what_plan_prints_serves_as_forecast(tmp_path: Path) -> None:
    """Of a run that an earlier release trained."""
    folder = weight_lora_plus_run(tmp_path / "run", layers=2, planned=True)
    data = json.loads((folder / "forecast.json").read_text())
    (folder / "forecast.json").write_text(json.dumps({"fits": True, "phases": data["phases"]}))
    written = write_report([folder], tmp_path / "report")
    text = written[0].read_text()
    assert (
        "memory.png" in {path.name for path in written} and "select, forecast 671.1 MB, select, fact 943.7 MB" in text
    )
