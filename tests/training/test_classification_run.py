"""A run on labelled data, on an encoder and on a causal language model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines

pytestmark = pytest.mark.distributed


@pytest.fixture
def causal_folder(model_folder: Path, tmp_path: Path) -> Path:
    """The tiny Llama with large weights: those it is made with give logits near zero, whatever adapters add."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 20
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("folder", ["encoder_folder", pytest.param("causal_folder", marks=pytest.mark.long)])
def test_a_classification_is_learned(folder: str, labelled_folder: Path, settings: dict, request, tmp_path) -> None:
    """Label 1 is a matter of one word: the training loss halves and validation gets better than the majority."""
    settings["model"]["name"] = str(request.getfixturevalue(folder))
    settings["task"] = {
        "name": "custom",
        "path": str(labelled_folder),
        "max_length": 32,
        "prompt": "{sentence} ?",
        "labels": ["cake", "book"],
        "metrics": ["matthews", "accuracy"],
    }
    settings["training"] |= {"max_steps": 40, "learning_rate": 0.02, "micro_batch_size": 8}
    settings["evaluation"] |= {"split": "validation", "samples": 12, "micro_batch_size": 8}
    statuses = run_worlds({"run": {"trees": settings, "world_size": 1}}, tmp_path / "logs")
    output = last_lines(tmp_path / "logs" / "run")
    assert statuses["run"] == [0] and "MISSING" not in output, output
    run = Path(settings["output_dir"])
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    assert metrics["after"]["loss"] < 0.5 * metrics["before"]["loss"], metrics
    assert metrics["after"]["accuracy"] > 100 * 8 / 12 and metrics["after"]["matthews"] > 50, metrics
    rows = [json.loads(line) for line in (run / "predictions-after.jsonl").read_text().splitlines()]
    assert {row["prediction"] for row in rows} == {"cake", "book"}
