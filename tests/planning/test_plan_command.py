"""`sparse-llm-ft plan`: exit status, the JSON contract, errors, and a base of which only config.json is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sparse_llm_ft.cli.main import main
from sparse_llm_ft.cli.plan_command import parse_size
from sparse_llm_ft.config import merge
from sparse_llm_ft.errors import UserError

Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(settings: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Runs the command: exit status, standard output, standard error. No samples are in its cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def run(*arguments: str, changed: dict | None = None) -> tuple[int, str, str]:
        method = {"method": {"name": "weight_lora", "keep": 3, "steps": 2, "batch_growth": "none"}}
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(merge(merge(settings, method), changed or {})))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["plan", "--config", str(config), *arguments])
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_the_json_is_the_contract(plan: Plan) -> None:
    status, out, _ = plan("--json", "--gpu-memory", "4GiB", "--gpus", "2", "--nodes", "2")
    assert status == 0
    found = json.loads(out)
    assert found.keys() == {"fits", "phases"} and found["fits"] is True
    assert [phase["name"] for phase in found["phases"]] == ["select", "train"]
    for phase in found["phases"]:
        assert list(phase) == [
            "name",
            "micro_batch_size",
            "lines",
            "peak_bytes",
            "peaks",
            "flops_per_step",
            "communicated_bytes_per_step",
        ]
        assert list(phase["peaks"]) == ["load", "step", "change", "save", "evaluate"]
        assert phase["peak_bytes"] == max(phase["peaks"].values())
        assert all(type(size) is int for size in (*phase["lines"].values(), *phase["peaks"].values()))
        assert phase["micro_batch_size"] == 2 and phase["communicated_bytes_per_step"] > 0


def test_an_offloaded_optimizer_is_in_the_hosts_memory(plan: Plan) -> None:
    offload = {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}
    plans = (json.loads(plan("--json", "--gpu-memory", "4GiB", changed=changed)[1]) for changed in ({}, offload))
    on_device, offloaded = (found["phases"][0]["lines"] for found in plans)
    assert on_device["optimizer"] > 0 == offloaded["optimizer"]


def test_what_does_not_fit_ends_with_status_3(plan: Plan) -> None:
    """One byte less than the peak is too little."""
    peak = max(phase["peak_bytes"] for phase in json.loads(plan("--json", "--gpu-memory", "4GiB")[1])["phases"])
    for memory, status, fits in ((peak, 0, True), (peak - 1, 3, False)):
        found = plan("--json", "--gpu-memory", str(memory))
        assert found[0] == status and json.loads(found[1])["fits"] is fits
    status, out, _ = plan("--gpu-memory", "1MiB", "--no-others")
    assert status == 3 and "does not fit:" in out.splitlines()[-1]


def test_tables_say_what_was_assumed_and_how_long_it_takes(plan: Plan) -> None:
    status, out, _ = plan("--gpu-memory", "4GiB", "--tflops", "1e-6", "--no-others")
    assert status == 0
    assert "the samples are not tokenised yet: planned for 32 tokens each" in out
    assert "phase select: 14 adapters" in out and "phase train: 3 adapters" in out
    assert "assumed: 3 of 14 adapters survive" in out
    assert "6 steps" in out and "GPU hours" in out and "assumed, see docs/planning.md" in out
    assert out.splitlines()[-1].startswith("fits: ")


@pytest.mark.long
def test_other_methods_stand_in_a_table_of_their_own(plan: Plan) -> None:
    status, out, _ = plan("--gpu-memory", "4GiB", changed={"method": "lora"})
    assert status == 0
    table = out[out.index("other methods at their defaults") :]
    for name in ("lora", "weight_lora", "partial_lora", "lora_drop", "vera", "full", "random_masking"):
        assert any(line.split()[0] == name for line in table.splitlines()[2:] if line.strip()), (name, table)


def test_config_json_alone_is_enough(plan: Plan, model_folder: Path, tmp_path: Path) -> None:
    """No weights, no tokenizer, no data."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(model_folder / "config.json", bare)
    changed = {"model": {"name": str(bare)}, "task": {"path": str(bare)}}
    with_weights = json.loads(plan("--json", "--gpu-memory", "4GiB")[1])
    status, out, _ = plan("--json", "--gpu-memory", "4GiB", changed=changed)
    assert status == 0 and json.loads(out) == with_weights


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu-memory", "much"], "--gpu-memory much: expected a size such as 80GiB"),
        (["--gpus", "0"], "--gpus 0: expected 1 or more"),
        (["--gpus", "3"], "training.global_batch_size: 8 is not a multiple of"),
        (["--gpu-memory", "1GiB", "--tflops", "0"], "--tflops 0: expected a positive number"),
        (["--gpu-memory", "1GiB", "--tflops", "1", "--card", "A100"], "expected one of them"),
        (["--gpu-memory", "1GiB", "--card", "A1", "--no-others"], "--card A1: expected one of H100 PCIe"),
        (["--gpu-memory", "1GiB", "--card", "A100", "--mfu", "2"], "--mfu 2: expected a share"),
    ],
)
def test_mistakes_are_one_line_and_status_2(plan: Plan, arguments: list[str], said: str) -> None:
    status, _, error = plan(*arguments)
    assert status == 2 and said in error and len(error.strip().splitlines()) == 1


def test_sizes() -> None:
    assert [parse_size(text) for text in ("80GiB", "24 GB", "1.5MiB", "7")] == [80 * 2**30, 24 * 10**9, 3 * 2**19, 7]
    for text in ("", "GiB", "-1GiB", "1 XB", "1e3"):
        with pytest.raises(UserError, match="expected a size"):
            parse_size(text)
