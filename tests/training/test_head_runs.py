"""Regression, answers in a text and a decoder with a head through complete runs; and scores and answers written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score

from helpers.mode_runs import (
    METHODS,
    adapter_settings,
    asked_for,
    exported,
    marked,
    mode_settings,
    predictions_of,
    run_all,
    summary_of,
)
from helpers.tiny_modes import ANSWERS, LABELLED, SCORE, SCORED, UNANSWERABLE, make_answers, make_scored

SCORES = [f"score-{method}" for method in METHODS if method != "full"]
SPANS = [f"spans-{method}" for method in METHODS if method not in ("adalora", "full")]
WRITTEN = ["written-scores", "written-answers"]
ALL = [*SCORES, *SPANS, "spans-or-none", "decoder-labels", *WRITTEN]
LONG = {"score-drop", "score-compact", "spans-weight"}
"""Methods that `make test` runs on the other kind of head."""
KINDS = {"score": "SEQ_CLS", "spans": None, "decoder": "SEQ_CLS", "written": "CAUSAL_LM"}
Trees = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def trees(encoder_folder: Path, model_folder: Path, labelled_folder: Path, tmp_path_factory) -> Trees:
    folder = tmp_path_factory.mktemp("heads")
    for name in ("scored", "answers", "unanswerable"):
        (folder / name).mkdir()
    make_scored(folder / "scored")
    make_answers(folder / "answers")
    make_answers(folder / "unanswerable", unanswerable=True)
    head = {"mode": "sequence_classification"}
    wanted = {
        **{name: (encoder_folder, folder / "scored", SCORED, name.split("-")[1]) for name in SCORES},
        **{name: (encoder_folder, folder / "answers", ANSWERS, name.split("-")[1]) for name in SPANS},
        "spans-or-none": (encoder_folder, folder / "unanswerable", UNANSWERABLE, "lora"),
        "decoder-labels": (model_folder, labelled_folder, LABELLED | head, "lora"),
        "written-scores": (model_folder, folder / "scored", SCORED, "lora"),
        "written-answers": (model_folder, folder / "unanswerable", UNANSWERABLE, "lora"),
    }
    trees = {name: mode_settings(*arguments, folder / f"run-{name}") for name, arguments in wanted.items()}
    trees["decoder-labels"]["training"]["head_learning_rate"] = 3 * trees["decoder-labels"]["training"]["learning_rate"]
    return trees


@pytest.fixture(scope="module")
def results(trees: Trees, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, str]:
    return run_all(asked_for(trees, LONG, request), tmp_path_factory.mktemp("worlds"))


@pytest.mark.parametrize("name", marked(ALL, LONG))
def test_stock_peft_has_what_was_measured(name: str, trees: Trees, results: dict[str, str]) -> None:
    """With the head, and with everything that the tokenizer gives handed on to the model."""
    assert results[name] == "passed", results[name]
    _, loss = exported(trees[name])
    settings = adapter_settings(trees[name])
    assert settings["task_type"] == KINDS[name.partition("-")[0]]
    assert loss == pytest.approx(summary_of(trees[name])["metrics"]["after"]["loss"], abs=1e-4)


@pytest.mark.parametrize("name", marked(ALL, LONG))
def test_the_loss_falls_and_the_head_is_in_the_adapter(name: str, trees: Trees, results: dict[str, str]) -> None:
    metrics = summary_of(trees[name])["metrics"]
    assert metrics["after"]["loss"] < (0.99 if name in WRITTEN else 0.85) * metrics["before"]["loss"]
    head = {"score": "classifier", "spans": "qa_outputs", "decoder": "score"}.get(name.partition("-")[0])
    assert adapter_settings(trees[name]).get("modules_to_save") == (None if head is None else [head])
    weights = load_file(Path(trees[name]["output_dir"]) / "adapter" / "adapter_model.safetensors")
    whole = {key.removeprefix("base_model.model.").split(".")[0] for key in weights if "lora_" not in key}
    assert whole == (set() if head is None else {head})


@pytest.mark.parametrize("name", marked([*SCORES, "written-scores"], LONG))
def test_scores_are_measured_by_their_correlations(name: str, trees: Trees, results: dict[str, str]) -> None:
    """From the predictions file alone, by scipy."""
    found, rows = summary_of(trees[name])["metrics"]["after"], predictions_of(trees[name])
    assert list(found) == ["loss", "pearson", "spearman"] and len(rows) == 9
    if name == "written-scores":
        return
    predictions, labels = ([row[key] for row in rows] for key in ("prediction", "label"))
    assert labels == pytest.approx([1.1 * (i % 5) + i % 3 / 10 for i in range(100, 109)])
    assert found["pearson"] == pytest.approx(100 * pearsonr(predictions, labels).statistic)
    assert found["spearman"] == pytest.approx(100 * spearmanr(predictions, labels).statistic)
    squares = sum((p - label) ** 2 for p, label in zip(predictions, labels, strict=True)) / 9
    assert found["loss"] == pytest.approx(squares, rel=1e-5)


def test_a_written_score_is_shown_as_it_was_written(trees: Trees, results: dict[str, str]) -> None:
    rows = predictions_of(trees["written-scores"])
    assert all(isinstance(row["prediction"], str) for row in rows)
    numbers = [float(row["references"][0]) for row in rows]
    assert all(SCORE[0] <= number <= SCORE[1] for number in numbers) and len(set(numbers)) > 3


@pytest.mark.parametrize("name", marked([*SPANS, "spans-or-none"], LONG))
def test_answers_are_spans_of_their_contexts(name: str, trees: Trees, results: dict[str, str]) -> None:
    found, rows = summary_of(trees[name])["metrics"]["after"], predictions_of(trees[name])
    assert list(found) == ["loss", "exact_match", "f1"] and len(rows) == 9
    context = "anna tom meets anna in the park . tom meets anna in the station . the book : red . buys a cake ."
    assert {word for row in rows for word in row["prediction"].split()} <= set(context.split())

    def normalised(text: str) -> list[str]:  # SQuAD's: articles and punctuation do not count
        return [word for word in text.split() if word not in {"the", "a", ".", ":"}]

    right = [normalised(row["prediction"]) in [normalised(r) for r in row["references"]] for row in rows]
    empty = [not row["references"] and not row["prediction"] for row in rows]
    assert found["exact_match"] == pytest.approx(100 * sum(map(bool, map(max, right, empty))) / 9)
    assert (sum(not row["references"] for row in rows) == 3) == (name == "spans-or-none")


def test_a_decoder_with_a_head_is_measured_by_accuracy(trees: Trees, results: dict[str, str]) -> None:
    found, rows = summary_of(trees["decoder-labels"])["metrics"]["after"], predictions_of(trees["decoder-labels"])
    accuracy = accuracy_score([row["label"] for row in rows], [row["prediction"] for row in rows])
    assert found["accuracy"] == pytest.approx(100 * accuracy) and {row["label"] for row in rows} == {"cake", "book"}


def test_a_heads_own_rate_follows_the_schedule_and_is_logged(trees: Trees, results: dict[str, str]) -> None:
    lines = {name: step_lines(trees[name]) for name in ("decoder-labels", "score-lora")}
    assert all("head_learning_rate" not in line for line in lines["score-lora"])
    rates = [(line["learning_rate"], line["head_learning_rate"]) for line in lines["decoder-labels"]]
    assert len({rate for rate, _ in rates}) > 1
    for rate, head in rates:
        assert head == pytest.approx(3 * rate)


def step_lines(tree: dict[str, Any]) -> list[dict[str, Any]]:
    text = (Path(tree["output_dir"]) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
