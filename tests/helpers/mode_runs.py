"""Settings of short runs in every mode, and what their adapters give on the plain models."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging

from helpers.all_methods import DROP, PARTIAL, WEIGHT
from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
from helpers.tiny_run import run_settings
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.data.dataset import SplitBuilder
from sparse_llm_ft.data.reading import read_split
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.model.architecture import find_task_mode
from sparse_llm_ft.objectives.build import build_objective

# Random models hardly notice what is zeroed: with a floor below their own loss everything would be.
_PARTIAL = PARTIAL | {"accuracy_floor": 0.999}
METHODS: Mapping[str, Any] = {
    "lora": "lora",
    "weight": WEIGHT | {"name": "weight_lora_plus"},
    "drop": DROP,
    "partial": _PARTIAL,
    # Half the rows and columns: no search, which takes long.
    "compact": {"name": "partial_lora", "masking": "compact", "ratios": "balanced", "ratio": 0.5},
    "full": "full",
    "adalora": {"name": "adalora", "target_r": 2},
}
_CLASSES: Mapping[str, Any] = {
    "sequence_classification": AutoModelForSequenceClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "causal_lm": AutoModelForCausalLM,
    "seq2seq_lm": AutoModelForSeq2SeqLM,
}


def mode_settings(model: Path, data: Path, task: Mapping[str, Any], method: str, output: Path) -> dict[str, Any]:
    """8 steps, measured on 9 samples."""
    tree = run_settings(model, data, output)
    tree["task"] = {**task, "path": str(data)}
    tree["adapter"]["lora_dropout"] = 0.0
    tree["training"] |= {"learning_rate": 0.02, "micro_batch_size": 4}
    tree["evaluation"] |= {"split": "validation", "samples": 9, "micro_batch_size": 4, "max_new_tokens": 6}
    found = METHODS[method]
    if isinstance(found, dict) and found["name"] == "partial_lora":
        found = found | {"cache_dir": f"{output}-cache"}
    return tree | {"method": found}


def run_all(trees: Mapping[str, Mapping[str, Any]], folder: Path, world_size: int = 1) -> dict[str, str]:
    """Name -> "passed", or the end of the run's log."""
    worlds = {name: {"trees": tree, "world_size": world_size} for name, tree in trees.items()}
    statuses = run_worlds(worlds, folder)
    return {n: "passed" if s == [0] * world_size else last_lines(folder / n) for n, s in statuses.items()}


def asked_for(trees: Mapping[str, Any], long: Collection[str], request: pytest.FixtureRequest) -> dict[str, Any]:
    """The trees that the chosen tests of a file look at: without the long ones, unless a long test is among them."""
    here = [item for item in request.session.items if item.path == request.path]
    everything = any(item.get_closest_marker("long") for item in here)
    return {name: tree for name, tree in trees.items() if everything or name not in long}


def marked(names: Iterable[str], long: Collection[str]) -> list[Any]:
    """Parameters of a test, of which `long` are for `make test-long`."""
    return [pytest.param(name, marks=[pytest.mark.long] if name in long else []) for name in names]


def summary_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads((Path(tree["output_dir"]) / "summary.json").read_text())


def predictions_of(tree: Mapping[str, Any], moment: str = "after") -> list[dict[str, Any]]:
    lines = (Path(tree["output_dir"]) / f"predictions-{moment}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def adapter_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads((Path(tree["output_dir"]) / "adapter" / "adapter_config.json").read_text())


def exported(tree: Mapping[str, Any]) -> tuple[PeftModel, float]:
    """The run's adapter as stock PEFT has it on the plain model, and its mean loss over what the run measured, one
    sample after the other.
    """
    config = parse_config(tree)
    task, name = resolve_task(config.task), config.model.name
    task_mode = find_task_mode(AutoConfig.from_pretrained(name), name, task, config.task.mode)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = PeftModel.from_pretrained(
        plain(name, task_mode.mode, task_mode.outputs), Path(tree["output_dir"]) / "adapter"
    ).eval()
    objective = build_objective(model, tokenizer, task)
    rows = read_split(resolve_task(config.task), config.evaluation.split)[: config.evaluation.samples]
    samples = list(SplitBuilder(config, task, tokenizer, task_mode).samples_of(rows))
    with torch.no_grad():
        total = sum(float(objective.loss(model, objective.batch([sample]))) for sample in samples)
    return model, total / sum(objective.units(sample) for sample in samples)


def plain(name: str | Path, mode: str, outputs: int | None = None) -> Any:
    """transformers' own model, with a head at random where the checkpoint has none."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return _CLASSES[mode].from_pretrained(name, **({} if outputs is None else {"num_labels": outputs}))
    finally:
        logging.set_verbosity(verbosity)
