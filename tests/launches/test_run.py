"""A whole run on two ranks through the command line: folder, numbers, adapter, launchers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from helpers.fork_server import run_script
from helpers.launching import TRAIN, last_lines, launch
from sparse_llm_ft.adapters import SparseLoraConfig, trained_parameters
from sparse_llm_ft.checkpoint.store import newest_valid
from sparse_llm_ft.cli.main import main as command_line
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan

pytestmark = pytest.mark.distributed


def test_the_folder_is_complete_and_free_of_pickle(finished_run: Path) -> None:
    names = {path.name for path in finished_run.iterdir()}
    assert {
        "config.yaml",
        "plan.json",
        "forecast.json",
        "metrics.jsonl",
        "summary.json",
        "state.json",
        "checkpoints",
        "adapter",
        "tensorboard",
        "phases",
        "report",
    } <= names
    assert [p.name for p in sorted((finished_run / "checkpoints").iterdir())] == [
        f"step-{step:08d}" for step in (4, 6, 8, 12, 14)
    ]
    others = (p for p in finished_run.rglob("*") if p.is_file() and "tensorboard" not in p.parts and p.name != ".lock")
    assert {p.suffix for p in others} <= {".json", ".jsonl", ".yaml", ".safetensors", ".html", ".png"}
    assert list((finished_run / "tensorboard").iterdir())


def test_metrics_have_one_object_a_step(finished_run: Path) -> None:
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 15))
    wanted = {
        "step", "phase", "loss", "learning_rate", "grad_norm", "samples", "tokens_per_second", "trainable_parameters",
        "active_adapters",
    }  # fmt: skip
    assert all(wanted <= set(line) for line in lines)
    assert [line["samples"] for line in lines] == [8 * step for step in range(1, 15)]
    assert [line["active_adapters"] for line in lines] == [14, 14] + [4] * 12
    assert [line["phase"] for line in lines] == ["select"] * 6 + ["train"] * 8
    assert [line["step"] for line in lines if "validation_loss" in line] == [7, 14]
    assert all(line["grad_norm"] > 0 for line in lines)


def test_the_summary_says_what_happened(finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    assert (summary["method"], summary["world_size"], summary["zero_stage"]) == ("weight_lora_plus", 2, 2)
    assert {"quantization", "seed", "versions"} <= set(summary)
    select, train = summary["phases"]
    assert (select["steps"], select["samples"], train["steps"], train["samples"]) == (6, 48, 8, 64)
    assert train["micro_batch_size"] >= select["micro_batch_size"] == 2
    assert select["global_batch_size"] == train["global_batch_size"] == 8
    matrices = select["trainable_parameters"] - 14  # without omega
    assert 0 < train["trainable_parameters"] <= matrices
    for phase, omegas in ((select, 14), (train, 0)):
        # In two shards: 12 bytes a value, 4 for an omega under SGD, and a little padding.
        expected = 6 * (phase["trainable_parameters"] - omegas) + 2 * omegas
        assert 0 <= phase["optimizer_bytes_per_rank"] - expected < 1000
        assert phase["seconds"] > 0 and phase["tokens_per_second"] > 0
    assert set(summary["metrics"]["before"]) == set(summary["metrics"]["after"]) == {
        "loss", "rouge1", "rouge2", "rougeL", "rougeLsum",
    }  # fmt: skip
    assert summary["metrics"]["after"]["loss"] < summary["metrics"]["before"]["loss"]


def test_what_was_planned_stands_beside_what_the_run_held(finished_run: Path) -> None:
    """Of the first phase each line to the byte; the second one's survivors were not known."""
    planned = json.loads((finished_run / "forecast.json").read_text())
    held = json.loads((finished_run / "summary.json").read_text())["phases"]
    assert [phase["name"] for phase in planned["phases"]] == [phase["name"] for phase in held] == ["select", "train"]
    lines, first = planned["phases"][0]["lines"], held[0]
    assert (
        lines["adapters"] == first["adapter_bytes_per_rank"] and lines["optimizer"] == first["optimizer_bytes_per_rank"]
    )
    # Rotary frequencies that two buffers share count twice in the forecast.
    assert 0 <= lines["base"] - first["base_bytes_per_rank"] <= 128 < first["base_bytes_per_rank"]
    assert held[1]["base_bytes_per_rank"] == first["base_bytes_per_rank"]
    peaks = [json.loads(line).get("peak_memory_bytes") for line in (finished_run / "metrics.jsonl").open()]
    if peaks[0] is not None:  # Linux
        assert all(peak > planned["process_bytes"] / 2 > 2**24 for peak in peaks)
    assert "memory.png" in {path.name for path in (finished_run / "report").iterdir()}


def test_the_plan_names_every_target_and_four_have_an_adapter(finished_run: Path) -> None:
    plan = AdapterPlan.from_dict(json.loads((finished_run / "plan.json").read_text()))
    assert len(plan.modules) == 14 and len(plan.active) == 4
    assert all(adapter.r >= 4 and not adapter.train_omega for adapter in plan.active.values())


def test_nothing_of_the_disconnected_is_in_the_last_checkpoint(finished_run: Path) -> None:
    newest, complaints = newest_valid(finished_run / "checkpoints")
    assert newest is not None and not complaints
    state = newest.state
    active = Phase.from_dict(state.phase).plan.active
    assert {name.rpartition(".")[0] for name in state.tensors} == set(active)
    assert set(state.moments) == set(state.tensors)


LOGITS = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
assert not any(name.startswith("sparse_llm_ft") for name in sys.modules)
torch.manual_seed(0)
torch.save(model(torch.randint(3, 20, (3, 9))).logits, sys.argv[3])
"""


def test_the_adapter_is_a_stock_peft_lora(finished_run: Path, model_folder: Path, tmp_path: Path) -> None:
    """A process without this package gets the logits of the trained model (1e-5, float32)."""
    result = subprocess.run(
        [sys.executable, "-c", LOGITS, str(model_folder), str(finished_run / "adapter"), str(tmp_path / "logits.pt")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    stock = torch.load(tmp_path / "logits.pt", weights_only=True)
    newest, _ = newest_valid(finished_run / "checkpoints")
    state = newest.state
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    torch.manual_seed(0)
    tokens = torch.randint(3, 20, (3, 9))
    untrained = base(tokens).logits
    model = get_peft_model(base, SparseLoraConfig(plan=Phase.from_dict(state.phase).plan)).eval()
    for name, parameter in trained_parameters(model).items():
        parameter.data.copy_(state.tensors[name])
    trained = model(tokens).logits
    assert (stock - trained).abs().max() < 1e-5
    assert (stock - untrained).abs().max() > 1e-2
    config = json.loads((finished_run / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and len(config["target_modules"]) == 4


def test_a_finished_run_is_left_alone(finished_run: Path, plus_settings: dict, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(plus_settings | {"output_dir": str(finished_run)}))
    status, output = run_script(TRAIN, ["--config", str(config)], tmp_path / "logs")
    assert status == 0 and "is complete; nothing to do" in output, output
    assert before == {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()}


@pytest.mark.long
def test_torchrun_gives_the_same_adapter_bit_for_bit(finished_run: Path, plus_settings: dict, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(plus_settings | {"output_dir": str(tmp_path / "torchrun")}))
    result = launch(TRAIN, "--config", str(config), launcher="torchrun")
    assert result.returncode == 0, last_lines(result)
    adapter = Path("adapter") / "adapter_model.safetensors"
    assert (tmp_path / "torchrun" / adapter).read_bytes() == (finished_run / adapter).read_bytes()


def test_the_commands_around_a_run(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command_line(["summary", str(finished_run)])
    assert "weight_lora_plus" in capsys.readouterr().out
    command_line(["export", str(finished_run), "--output", str(tmp_path / "exported")])
    exported = tmp_path / "exported" / "adapter_model.safetensors"
    assert exported.read_bytes() == (finished_run / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as stop:
        command_line(["export", str(finished_run), "--output", str(tmp_path / "exported")])
    assert stop.value.code == 2 and "exists; choose a new folder" in capsys.readouterr().err
    command_line(["check", "--config", str(finished_run / "config.yaml"), f"output_dir={tmp_path / 'x'}"])
    assert "phase select: 14 adapters" in capsys.readouterr().out
    for wrong in (["--processes", "0"], ["task.max_length=8", "task.completion={text} {text} {text}"]):
        with pytest.raises(SystemExit) as stop:
            config = ["--config", str(finished_run / "config.yaml"), f"output_dir={tmp_path / 'x'}"]
            command_line(["check", *config, *wrong] if wrong[0] != "--processes" else ["check", *wrong, *config])
        assert stop.value.code == 2


@pytest.mark.long
def test_a_run_on_a_sharded_four_bit_base(plus_settings: dict, tmp_path: Path) -> None:
    """Stage 3: measured before it trains, through a change of phase, to the end."""
    settings = plus_settings | {
        "model": plus_settings["model"] | {"dtype": "bfloat16", "quantization": "nf4"},
        "deepspeed": {"zero_stage": 3},
        "output_dir": str(tmp_path / "run"),
        "report": False,
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    result = launch(TRAIN, "--config", str(config), timeout=900)
    assert result.returncode == 0, last_lines(result)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["zero_stage"], summary["quantization"], len(summary["phases"])) == (3, "nf4", 2)
    assert summary["metrics"]["after"]["loss"] < summary["metrics"]["before"]["loss"]
