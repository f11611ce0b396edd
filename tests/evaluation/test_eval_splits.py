"""What a measurement says of each kind of task, from its predictions file alone; and that ranks do not change it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score

from helpers.contexts import open_context
from helpers.mode_runs import mode_settings, predictions_of, run_all, summary_of
from helpers.tiny_modes import (
    ANSWERS,
    INFERENCES,
    SCORED,
    SUMMARIES,
    UNANSWERABLE,
    make_answers,
    make_inferences,
    make_scored,
    make_summaries,
    make_t5,
)
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.data.dataset import Splits
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.evaluation import evaluator
from sparse_llm_ft.evaluation.evaluator import Evaluator, as_score
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.model.loading import find_model_task_mode, load_model, load_tokenizer
from sparse_llm_ft.objectives.build import build_objective

WORLD = World(0, 1, 0, 1)
KINDS = ("texts", "scores", "labels", "spans")


@pytest.fixture(scope="module")
def trees(encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Runs of one step; 9 and 7 samples are dealt in batches of 2, so that two ranks have unlike and empty ones."""
    folder = tmp_path_factory.mktemp("measured")
    for name, make in (
        ("t5", make_t5),
        ("texts", make_summaries),
        ("scores", make_scored),
        ("labels", make_inferences),
        ("spans", lambda path: make_answers(path, unanswerable=True)),
    ):
        (folder / name).mkdir()
        make(folder / name)
    tasks = dict(zip(KINDS, (SUMMARIES, SCORED, INFERENCES, UNANSWERABLE | {"max_length": 24}), strict=True))
    trees = {}
    for name, task in tasks.items():
        for ranks in (1, 2):
            model = folder / "t5" if name == "texts" else encoder_folder
            tree = mode_settings(model, folder / name, task, "lora", folder / f"run-{name}-{ranks}")
            tree["training"] |= {"max_steps": 1}
            tree["evaluation"] |= {"micro_batch_size": 2}
            trees[f"{name}-{ranks}"] = tree
    return trees


@pytest.fixture(scope="module")
def results(trees: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for ranks in (1, 2):
        chosen = {name: tree for name, tree in trees.items() if name.endswith(str(ranks))}
        found |= run_all(chosen, tmp_path_factory.mktemp("worlds"), world_size=ranks)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_measure_what_one_does(kind: str, trees: dict, results: dict[str, str]) -> None:
    assert results[f"{kind}-1"] == results[f"{kind}-2"] == "passed", results
    one, two = (summary_of(trees[f"{kind}-{ranks}"])["metrics"]["before"] for ranks in (1, 2))
    assert two == pytest.approx(one, rel=1e-5) and list(two) == list(one)
    rows, others = (predictions_of(trees[f"{kind}-{ranks}"], "before") for ranks in (1, 2))
    assert len(rows) == len(others) == (16 if kind == "labels" else 9)
    for row, other in zip(rows, others, strict=True):
        assert other == (row | {"prediction": pytest.approx(row["prediction"], rel=1e-5)} if kind == "scores" else row)


def test_a_further_split_has_its_own_metrics_and_rows(trees: dict, results: dict[str, str]) -> None:
    found, rows = summary_of(trees["labels-1"])["metrics"]["after"], predictions_of(trees["labels-1"])
    assert list(found) == ["loss", "accuracy", "loss_mismatched", "accuracy_mismatched"]
    parts = {"accuracy": [row for row in rows if "split" not in row]}
    parts["accuracy_mismatched"] = [row for row in rows if row.get("split") == "mismatched"]
    assert [len(part) for part in parts.values()] == [9, 7]
    for name, part in parts.items():
        accuracy = accuracy_score([row["label"] for row in part], [row["prediction"] for row in part])
        assert found[name] == pytest.approx(100 * accuracy)
    words = ["yes", "maybe", "no"]
    assert [row["label"] for row in rows] == [words[i % 3] for i in (*range(100, 109), *range(200, 207))]
    assert found["loss"] != found["loss_mismatched"]


@pytest.fixture
def measured(process_group: None, tmp_path: Path, monkeypatch) -> Callable[..., tuple[dict, list]]:
    """Measures a task on a model that writes given texts."""

    def measure(model: Path, data: Path, task: dict, texts: list[str]) -> tuple[dict[str, float], list[dict]]:
        run = open_context(parse_config(mode_settings(model, data, task, "lora", tmp_path / "run")), WORLD)
        config, predictions = run.config, tmp_path / "predictions.jsonl"
        task_mode = find_model_task_mode(config.model, run.task, config.task.mode)
        tokenizer, base = load_tokenizer(config.model, task_mode), load_model(config.model, task_mode)
        parts = Splits.encode(config, run.task, tokenizer, task_mode).measured
        objective = build_objective(base, tokenizer, run.task)
        monkeypatch.setattr(evaluator, "generate", lambda *arguments, **options: texts)
        with torch.no_grad():
            found = Evaluator(
                config.evaluation, run.task, task_mode, parts, tokenizer, objective, WORLD, 0, 0, Console(1)
            )(base, predictions)
        return found, [json.loads(line) for line in predictions.read_text().splitlines()]

    return measure


def test_saying_that_there_is_no_answer_is_right_where_there_is_none(measured, model_folder: Path, tmp_path) -> None:
    """Rows 2, 5 and 8 have no answer; an answer is wrong there, and the word for none elsewhere."""
    (tmp_path / "data").mkdir()
    make_answers(tmp_path / "data", unanswerable=True)
    texts = ["park", "The station!", "unanswerable", "unanswerable", "station", " unanswerable", "a book", "x", "park"]
    found, rows = measured(model_folder, tmp_path / "data", dict(UNANSWERABLE), texts)
    assert [bool(row["references"]) for row in rows] == [True, True, False] * 3
    right = [
        text.strip() == "unanswerable" if not row["references"] else text.lower().strip("!") in row["references"]
        for text, row in zip(texts, rows, strict=True)
    ]
    assert 3 <= sum(right) < 8
    assert found["exact_match"] == pytest.approx(100 * sum(right) / 9)
    assert [row["prediction"] for row in rows] == texts, "as they were written"


def test_no_answer_is_said_as_the_completion_says_it(measured, model_folder: Path, tmp_path) -> None:
    (tmp_path / "data").mkdir()
    make_answers(tmp_path / "data", unanswerable=True)
    task = dict(UNANSWERABLE) | {"completion": " It is: {answer}"}
    found, rows = measured(model_folder, tmp_path / "data", task, ["It is: unanswerable", "x", "unanswerable"] * 3)
    assert [bool(row["references"]) for row in rows] == [True, True, False] * 3 and found[
        "exact_match"
    ] == pytest.approx(100 / 3)
    found, _ = measured(model_folder, tmp_path / "data", task, ["y", "x", "It is: unanswerable"] * 3)
    assert found["exact_match"] == pytest.approx(100 / 3)


def test_where_every_question_has_an_answer_the_word_is_one_like_others(measured, model_folder: Path, tmp_path) -> None:
    (tmp_path / "data").mkdir()
    make_answers(tmp_path / "data")
    found, rows = measured(model_folder, tmp_path / "data", dict(ANSWERS), ["unanswerable"] * 9)
    assert found["exact_match"] == 0.0 and all(len(row["references"]) == 2 for row in rows)


def test_numbers_are_read_from_what_is_written(measured, model_folder: Path, tmp_path) -> None:
    (tmp_path / "data").mkdir()
    make_scored(tmp_path / "data")
    texts = ["0.2", "about 1.5 .", "7", "-3", "no number", "2 or 3", "", "4.4", "1.0"]
    found, rows = measured(model_folder, tmp_path / "data", dict(SCORED), texts)
    numbers = [0.2, 1.5, 5.0, 0.0, 0.0, 2.0, 0.0, 4.4, 1.0]
    scores = [1.1 * (i % 5) + i % 3 / 10 for i in range(100, 109)]
    assert found["pearson"] == pytest.approx(100 * pearsonr(numbers, scores).statistic)
    assert found["spearman"] == pytest.approx(100 * spearmanr(numbers, scores).statistic)
    assert [row["references"] for row in rows] == [[f"{score:.1f}"] for score in scores]
    assert [row["prediction"] for row in rows] == texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3.25", 3.25),
        (" 4", 4.0),
        ("the score is 2.5, or 3", 2.5),
        ("-1.5", 1.0),
        ("12", 5.0),
        ("none", 1.0),
        ("", 1.0),
        ("1e3", 1.0),
        ("2.", 2.0),
        ("say .5 or 4", 1.0),
    ],
)
def test_a_score_is_the_first_number_within_the_limits(text: str, expected: float) -> None:
    assert as_score(text, (1.0, 5.0)) == expected
