from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.run_folders import lora_drop_run, lora_run, partial_run, weight_lora_plus_run
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.report import RunReport
from sparse_llm_ft.report.grid import module_grid


def test_importing_the_report_is_light() -> None:
    code = "import sys, sparse_llm_ft.report; print({'torch', 'matplotlib', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_a_finished_run_is_read(tmp_path: Path) -> None:
    report = RunReport.read(weight_lora_plus_run(tmp_path / "run", layers=3))
    assert (report.method, report.task, report.finished) == ("weight_lora_plus", "dialogsum", True)
    assert (
        [phase["name"] for phase in report.phases] == [total["name"] for total in report.totals] == ["select", "train"]
    )
    assert len(report.steps) == 180 and report.steps[0]["omega"] and report.steps[-1]["omega"] is None
    assert report.settings["method.weight_lora_plus.keep"] == 7
    assert report.choice is not None and report.choice.kept == frozenset(report.phases[1]["plan"].active)
    assert report.residual_norms == report.phases[1]["delta_norms"]
    assert report.totals[0]["optimizer_bytes_per_rank"] == 12 * report.totals[0]["trainable_parameters"]


def test_choices_and_ratios_are_read(tmp_path: Path) -> None:
    choice = RunReport.read(lora_drop_run(tmp_path / "drop", layers=4)).choice
    assert choice is not None and choice.symbol == "y" and 0 < len(choice.kept) < len(choice.values)
    scores = RunReport.read(partial_run(tmp_path / "partial", layers=2)).partial_scores
    assert scores is not None and set(scores["overlap"]) == {"svd-snip", "svd-imp", "snip-imp"}
    assert len(scores["ratios"]["model.layers.0.self_attn.q_proj"]) == 2


def test_kept_fractions_are_the_masks_or_what_was_derived_for_them(tmp_path: Path) -> None:
    folder = partial_run(tmp_path / "run", layers=2)
    report, name = RunReport.read(folder), "model.layers.0.self_attn.q_proj"
    assert report.kept_fractions is not None and report.partial_scores is not None
    rows, columns = report.kept_fractions[name]
    assert rows * 64 == round(rows * 64) and abs(rows - report.partial_scores["ratios"][name][0]) < 1 / 64
    assert 0 < columns < 1
    (folder / "phases" / "01-train.json").unlink()
    report = RunReport.read(folder)
    assert report.partial_scores is not None and report.kept_fractions == report.partial_scores["ratios"]
    assert RunReport.read(lora_run(tmp_path / "plain", {"a.0.q": (4, 4)})).kept_fractions is None


def test_an_unfinished_run_is_read_up_to_its_torn_line(tmp_path: Path) -> None:
    folder = weight_lora_plus_run(tmp_path / "run", layers=2, finished=False)
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-40])
    report = RunReport.read(folder)
    assert not report.finished and report.method == "weight_lora_plus" and len(report.steps) == 179
    first, second = report.totals
    assert (first["steps"], second["steps"], second["samples"]) == (60, 119, 16 * 119)
    assert "optimizer_bytes_per_rank" not in second and "seconds" not in second


def test_a_skipped_update_is_no_step_to_draw(tmp_path: Path) -> None:
    folder = weight_lora_plus_run(tmp_path / "run", layers=2)
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[4] |= {"loss": None, "grad_norm": None, "skipped": True}
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = RunReport.read(folder).steps
    assert [step["step"] for step in steps[:6]] == [1, 2, 3, 4, 6, 7]


def test_a_run_of_several_methods_has_all_their_names(tmp_path: Path) -> None:
    folder = lora_run(tmp_path / "run", {"a.0.q": (4, 4)}, finished=False)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("- name: lora", "- name: lora_drop\n- name: partial_lora\n  shots: 4"))
    report = RunReport.read(folder)
    assert report.method == "lora_drop + partial_lora" and report.settings["method.partial_lora.shots"] == 4


def test_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: no config.yaml; expected a run's output_dir"):
        RunReport.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "model: ["),
        ("config.yaml", "seed: 1\n"),
        ("summary.json", "{"),
        ("summary.json", '{"phases": [], "metrics": {"after": {"loss": "low"}}, "world_size": 1}'),
        ("summary.json", '{"phases": [], "metrics": {}, "world_size": Infinity}'),
        ("phases/01-train.json", '{"index": 1}'),
        ("phases/01-train.json", "[]"),
        ("forecast.json", '{"phases": [{"name": "select"}]}'),
        ("forecast.json", '{"phases": [], "process_bytes": "much"}'),
        ("forecast.json", '{"phases": [{"name": "a", "micro_batch_size": 1, "lines": {}, "peaks": {"step": 1}}]}'),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, text: str) -> None:
    folder = weight_lora_plus_run(tmp_path / "run", layers=1, finished=name == "summary.json")
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=f"{name}: not readable"):
        RunReport.read(folder)


def test_an_adapter_without_a_shape_is_named(tmp_path: Path) -> None:
    folder = lora_run(tmp_path / "run", {"a.0.q": (4, 4)})
    path = folder / "phases" / "00-train.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shapes": {}}))
    with pytest.raises(UserError, match=r"00-train\.json: not readable .*no shape of a\.0\.q"):
        RunReport.read(folder)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"scores": {"kind": "omega", "omega": {}}}, "at least 1 item"),
        ({"scores": {"kind": "lora_output", "y": {}, "kept": []}}, "at least 1 item"),
        ({"scores": {"kind": "partial", "ratios": {}, "overlap": {"svd-imp": {}}}}, "at least 1 item"),
        ({"shapes": {"a.0.q": [0, 0]}}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_drawn_is_said(change: dict, problem: str, tmp_path: Path) -> None:
    folder = lora_run(tmp_path / "run", {"a.0.q": (4, 4)})
    path = folder / "phases" / "00-train.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=rf"00-train\.json: not readable .*{problem}"):
        RunReport.read(folder)


def test_a_phase_has_no_negative_numbers(tmp_path: Path) -> None:
    path = weight_lora_plus_run(tmp_path / "run", layers=1) / "summary.json"
    summary = json.loads(path.read_text())
    summary["phases"][0]["trainable_parameters"] = -5
    path.write_text(json.dumps(summary))
    with pytest.raises(UserError, match=r"summary\.json: not readable .*greater than or equal to 0"):
        RunReport.read(path.parent)


def test_unknown_scores_are_said(tmp_path: Path) -> None:
    folder = lora_drop_run(tmp_path / "run", layers=2)
    path = folder / "phases" / "00-pilot.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scores": {"kind": "magic"}}))
    with pytest.raises(UserError, match="scores of kind 'magic'"):
        RunReport.read(folder)


def test_a_broken_line_before_the_last_is_an_error(tmp_path: Path) -> None:
    folder = lora_run(tmp_path / "run", {"a.0.q": (4, 4)})
    metrics = folder / "metrics.jsonl"
    metrics.write_text("{\n" + metrics.read_text())
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: not a logged step"):
        RunReport.read(folder)


def test_modules_are_placed_by_layer_and_type() -> None:
    grid = module_grid([f"model.layers.{i}.{t}" for i in (0, 1) for t in ("self_attn.q_proj", "mlp.up_proj")])
    assert (grid.layers, grid.kinds) == (("0", "1"), ("q_proj", "up_proj"))
    assert grid.places["model.layers.1.mlp.up_proj"] == (1, 1)
    assert grid.of_kind(0) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]


def test_types_of_an_encoder_are_told_apart() -> None:
    tails = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    grid = module_grid(f"encoder.layer.0.{tail}" for tail in tails)
    assert grid.kinds == ("query", "attention.output.dense", "intermediate.dense", "output.dense")


def test_two_stacks_and_unnumbered_modules_have_rows_of_their_own() -> None:
    grid = module_grid(["encoder.block.0.q", "encoder.block.1.q", "decoder.block.0.q", "head.dense"])
    assert grid.layers == ("encoder 0", "encoder 1", "decoder 0", "#3")
    flat = module_grid(["inner.query", "inner.value", "outer.query", "head"])
    assert flat.layers == ("#0", "#1", "#2") and flat.places["inner.value"] == (0, 1)
