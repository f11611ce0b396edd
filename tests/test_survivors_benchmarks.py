"""benchmarks/survivors.py: settings that a run allows, and the table; benchmarks/batch_growth.py on a tiny Llama."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import survivors
from bases import tiny_llama

from sparse_llm_ft.config import check_steps, parse_config

BENCHMARKS = Path(survivors.__file__).parent
RUNS = [survivors.Run(trial, system, 1) for trial in survivors.TRIALS for system in survivors.SYSTEMS]


def test_every_run_is_one_that_the_settings_allow(tmp_path: Path) -> None:
    for run in RUNS:
        (tmp_path / run.trial.setting.name).mkdir(parents=True, exist_ok=True)
        tree = run.config(Path("models"), tmp_path, tmp_path)
        config = parse_config(tree | {"model": {"name": "org/base", "dtype": "float32"}})
        check_steps(config, config.training.max_steps or 0)
        assert config.seed == 1 and config.adapter.target_modules == "all-linear"
    assert len({run.folder(tmp_path) for run in RUNS}) == len(RUNS)


def test_the_table_pairs_seeds(tmp_path: Path) -> None:
    trial, results = survivors.TRIALS[1], survivors.Finished(tmp_path / "results.jsonl", survivors.KEY)
    for system, gain in (("omega", 0.0), ("cost, budget 0.7", 1.0)):
        for seed in (0, 1):
            measured = "the lowest survivor is in encoder.layer.4: a step costs 0.63 of one with all adapters"
            phases = [{"steps": 5, "measured": measured}, {"steps": 7}]
            after = {"loss": 0.5, "accuracy": 80.0 + seed + gain * (1 + seed)}
            summary = {"phases": phases, "metrics": {"after": after}, "versions": {}}
            results.add(survivors.Run(trial, system, seed).key, survivors.result_of(summary, "accuracy"))
    text = "\n".join(survivors.page(survivors.Finished(results.file, survivors.KEY)))
    assert "K = 9, 12 steps" in text and "| cost, budget 0.8" not in text
    assert "| omega | 4, 4 | 0.63 | 0.500 ± 0.000 |  | 80.500 ± 0.707 |  | 2 |" in text
    assert "| 82.000 ± 1.414 | +1.500 ± 0.707 | 2 |" in text
    assert "minilm-glue-sst2, omega, 2" in text and "minilm-glue-sst2, omega, 1" not in text


@pytest.mark.long
def test_the_micro_batch_grows_and_the_real_peak_does_not_rise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama(layers=10)).save_pretrained(tmp_path)
    command = [sys.executable, str(BENCHMARKS / "batch_growth.py"), "--model", str(tmp_path), "--length", "128"]
    shown = subprocess.run([*command, "--steps", "1"], capture_output=True, text=True, check=True).stdout
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in shown.splitlines() if line.startswith("|")][2:]
    micro, peaks = [int(row[1]) for row in rows], [int(row[5].replace(",", "")) for row in rows]
    assert micro[0] == micro[1] == 2 < micro[2] and peaks[1] < peaks[2] <= peaks[0]
