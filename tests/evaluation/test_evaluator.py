"""From a labelled folder to metrics and predictions, on an encoder and on a causal language model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.contexts import open_context
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.data.dataset import Splits
from sparse_llm_ft.data.reading import read_split
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.evaluation.evaluator import Evaluator
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.model.loading import find_model_task_mode, load_model, load_tokenizer
from sparse_llm_ft.objectives.build import build_objective

WORLD = World(0, 1, 0, 1)
Make = Callable[..., RunContext]


@pytest.fixture
def prepared(labelled_folder: Path, settings: dict) -> Make:
    """Reads a labelled run on a model; its task settings are those of a classification, with changes."""

    def make(model: Path, **task: object) -> RunContext:
        settings["model"]["name"] = str(model)
        settings["task"] = {"name": "custom", "path": str(labelled_folder), "max_length": 32}
        settings["task"] |= {"prompt": "{sentence} ?", "labels": ["cake", "book"]} | task
        settings["evaluation"] |= {"split": "validation", "samples": 12, "micro_batch_size": 5}
        return open_context(parse_config(settings), WORLD)

    return make


def measured(run: RunContext, predictions: Path) -> tuple[dict[str, float], list[dict]]:
    config, task = run.config, run.task
    task_mode = find_model_task_mode(config.model, task, config.task.mode)
    tokenizer, model = load_tokenizer(config.model, task_mode), load_model(config.model, task_mode)
    samples = Splits.encode(config, task, tokenizer, task_mode)
    objective = build_objective(model, tokenizer, task)
    evaluator = Evaluator(
        config.evaluation, task, task_mode, samples.measured, tokenizer, objective, WORLD, 0, 0, Console(1)
    )
    metrics = evaluator(model, predictions)
    return metrics, [json.loads(line) for line in predictions.read_text().splitlines()]


def encoded(run: RunContext) -> Splits:
    task_mode = find_model_task_mode(run.config.model, run.task, run.config.task.mode)
    return Splits.encode(run.config, run.task, load_tokenizer(run.config.model, task_mode), task_mode)


@pytest.mark.parametrize("folder", ["encoder_folder", "model_folder"])
def test_a_classification_is_measured_by_its_labels(process_group, prepared: Make, request, tmp_path, folder) -> None:
    run = prepared(request.getfixturevalue(folder))
    metrics, rows = measured(run, tmp_path / "predictions.jsonl")
    assert set(metrics) == {"loss", "accuracy"}
    assert [row["label"] for row in rows] == [("cake", "book")[int("red" in row["prompt"])] for row in rows]
    assert {row["prediction"] for row in rows} <= {"cake", "book"} and len(rows) == 12
    assert metrics["accuracy"] == pytest.approx(100 * sum(row["prediction"] == row["label"] for row in rows) / 12)
    metrics, _ = measured(
        prepared(request.getfixturevalue(folder), metrics=["accuracy", "matthews"]), tmp_path / "again.jsonl"
    )
    assert set(metrics) == {"loss", "accuracy", "matthews"}


def test_a_generation_is_measured_as_before(process_group, settings: dict, tmp_path: Path) -> None:
    metrics, rows = measured(open_context(parse_config(settings), WORLD), tmp_path / "predictions.jsonl")
    assert list(metrics) == ["loss", "rouge1", "rouge2", "rougeL", "rougeLsum"]
    assert set(rows[0]) == {"prompt", "prediction", "references"} and len(rows) == 5


def test_samples_of_both_kinds_know_their_label(prepared: Make, encoder_folder: Path, model_folder: Path) -> None:
    for folder in (encoder_folder, model_folder):
        run = prepared(folder)
        samples = encoded(run)
        assert [sample.label for sample in samples.train] == [
            row.label for row in read_split(resolve_task(run.config.task), "train")
        ]
        assert sum(sample.label for sample in samples.train) == 16 and len(samples.train) == 40


def test_a_task_must_say_what_its_model_sees(prepared: Make, encoder_folder: Path, model_folder: Path) -> None:
    run = prepared(model_folder, prompt=None, texts=["sentence"])
    with pytest.raises(ConfigError, match=r"task.prompt: not given, and .* generates text"):
        encoded(run)
    run = prepared(encoder_folder, prompt=None, texts=["sentence"])
    assert len(encoded(run).measured[0].samples) == 12


def test_an_encoder_takes_no_more_than_a_pair(prepared: Make, encoder_folder: Path, tmp_path: Path) -> None:
    row = {"a": "red", "b": "blue", "c": "cake", "label": 0}
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    run = prepared(encoder_folder, path=str(tmp_path), prompt="{a} {b} {c}")
    with pytest.raises(ConfigError, match=r"task.texts: not given, and .* too many for the head of"):
        encoded(run)
