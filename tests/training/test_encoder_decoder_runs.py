"""T5 and BART through complete runs of several methods: what is learned, measured and left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file
from transformers import AutoTokenizer

from helpers.mode_runs import (
    adapter_settings,
    asked_for,
    exported,
    marked,
    mode_settings,
    plain,
    predictions_of,
    run_all,
    summary_of,
)
from helpers.tiny_modes import LABELLED, SUMMARIES, UNANSWERABLE, make_answers, make_bart, make_summaries, make_t5
from sparse_llm_ft.plan import AdapterPlan

METHODS = ("lora", "weight", "drop", "partial", "compact")
MODELS = ("t5", "bart")
NAMES = [f"{model}-{method}" for model in MODELS for method in METHODS]
ALL = [*NAMES, "t5-labels", "t5-answers"]  # with an adapter
LONG = {"t5-weight", "bart-drop", "t5-compact"}
"""Methods that `make test` runs on the other model."""
Trees = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def trees(labelled_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trees:
    folder = tmp_path_factory.mktemp("encoder-decoders")
    for name, make in (("t5", make_t5), ("bart", make_bart), ("summaries", make_summaries)):
        (folder / name).mkdir()
        make(folder / name)
    (folder / "answers").mkdir()
    make_answers(folder / "answers", unanswerable=True)
    trees = {}
    for name in NAMES:
        model, method = name.split("-")
        trees[name] = mode_settings(folder / model, folder / "summaries", SUMMARIES, method, folder / f"run-{name}")
    trees["bart-full"] = mode_settings(folder / "bart", folder / "summaries", SUMMARIES, "full", folder / "run-full")
    trees["t5-labels"] = mode_settings(folder / "t5", labelled_folder, LABELLED, "lora", folder / "run-labels")
    trees["t5-answers"] = mode_settings(folder / "t5", folder / "answers", UNANSWERABLE, "lora", folder / "run-answers")
    return trees


@pytest.fixture(scope="module")
def results(trees: Trees, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, str]:
    return run_all(asked_for(trees, LONG, request), tmp_path_factory.mktemp("worlds"))


@pytest.mark.parametrize("name", marked(ALL, LONG))
def test_stock_peft_has_what_was_measured(name: str, trees: Trees, results: dict[str, str]) -> None:
    assert results[name] == "passed", results[name]
    model, loss = exported(trees[name])
    assert type(model).__name__ == "PeftModelForSeq2SeqLM"
    assert adapter_settings(trees[name])["task_type"] == "SEQ_2_SEQ_LM"
    assert loss == pytest.approx(summary_of(trees[name])["metrics"]["after"]["loss"], abs=1e-4)


@pytest.mark.parametrize("name", marked([name for name in ALL if not name.endswith(("partial", "compact"))], LONG))
def test_the_loss_falls(name: str, trees: Trees, results: dict[str, str]) -> None:
    metrics = summary_of(trees[name])["metrics"]
    assert metrics["after"]["loss"] < 0.75 * metrics["before"]["loss"]


@pytest.mark.parametrize("model", MODELS)
def test_texts_are_measured_by_rouge_and_bleu(model: str, trees: Trees, results: dict[str, str]) -> None:
    """From the predictions file alone, by the libraries themselves."""
    found, rows = summary_of(trees[f"{model}-lora"])["metrics"]["after"], predictions_of(trees[f"{model}-lora"])
    assert list(found) == ["loss", "rouge1", "rouge2", "rougeL", "rougeLsum", "bleu"] and len(rows) == 9
    assert all(len(row["references"]) == 2 for row in rows)
    texts, references = ([row[key] for row in rows] for key in ("prediction", "references"))
    scorer = RougeScorer(["rouge1", "rougeLsum"], use_stemmer=True)
    for name in ("rouge1", "rougeLsum"):
        best = [
            max(scorer.score(reference, row["prediction"])[name].fmeasure for reference in row["references"])
            for row in rows
        ]
        assert found[name] == pytest.approx(100 * sum(best) / 9)
    bleu = sacrebleu.corpus_bleu(texts, [list(column) for column in zip(*references, strict=True)]).score
    assert found["bleu"] == pytest.approx(bleu)
    assert any(texts)


def test_a_whole_model_writes_what_was_measured(trees: Trees, results: dict[str, str]) -> None:
    """With the generation settings of its base, here the first token that it is made to write."""
    assert results["bart-full"] == "passed", results["bart-full"]
    folder = Path(trees["bart-full"]["output_dir"]) / "model"
    model, tokenizer = plain(folder, "seq2seq_lm").eval(), AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.forced_bos_token_id == 1
    rows = predictions_of(trees["bart-full"])
    with torch.no_grad():
        for row in rows:
            seen = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
            written = model.generate(seen, max_new_tokens=6, num_beams=1, do_sample=False)[0]
            assert tokenizer.decode(written, skip_special_tokens=True).strip() == row["prediction"]
    assert all(row["prediction"] for row in rows)


def test_label_words_are_written(trees: Trees, results: dict[str, str]) -> None:
    metrics, rows = summary_of(trees["t5-labels"])["metrics"]["after"], predictions_of(trees["t5-labels"])
    assert set(metrics) == {"loss", "accuracy"}
    assert metrics["accuracy"] == pytest.approx(100 * sum(row["prediction"] == row["label"] for row in rows) / 9)
    assert {row["prediction"] for row in rows} == {"cake", "book"}, "one word is learned alone"


def test_answers_are_written(trees: Trees, results: dict[str, str]) -> None:
    rows = predictions_of(trees["t5-answers"])
    assert set(summary_of(trees["t5-answers"])["metrics"]["after"]) == {"loss", "exact_match", "f1"}
    assert sum(not row["references"] for row in rows) == 3
    assert any(row["prediction"] for row in rows)


@pytest.mark.parametrize("model", MODELS)
def test_both_stacks_are_derived_without_whole_passes(model: str, trees: Trees, results: dict[str, str]) -> None:
    """Every layer of encoder and decoder has ratios, not all of them the same, and the lower ones are passed."""
    path = Path(trees[f"{model}-partial"]["output_dir"]) / "phases" / "00-derive.json"
    scores = json.loads(path.read_text())["scores"]
    assert all("ratios are 0" in note for note in scores["notes"])
    stacks = {name.removeprefix("model.").split(".")[0] for name in scores["ratios"]}
    assert stacks == {"encoder", "decoder"}
    assert len({share for pair in scores["ratios"].values() for share in pair}) > 2


@pytest.mark.parametrize("name", marked([f"{m}-{method}" for m in MODELS for method in ("partial", "compact")], LONG))
def test_masked_entries_are_zero_and_not_counted(name: str, trees: Trees, results) -> None:
    """In the exported pairs, wherever the masks are laid: by the optimizer, or by smaller matrices."""
    tree = trees[name]
    run = Path(tree["output_dir"])
    plan = AdapterPlan.from_dict(json.loads((run / "plan.json").read_text()))
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    count = 0
    for name, adapter in plan.active.items():
        a, b = (weights[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        rows = set(range(b.shape[0]) if adapter.rows is None else adapter.rows.indices)
        columns = set(range(a.shape[1]) if adapter.cols is None else adapter.cols.indices)
        assert {j for j in range(a.shape[1]) if a[:, j].any()} == columns
        assert {i for i in range(b.shape[0]) if b[i].any()} <= rows
        count += adapter.r * (len(rows) + len(columns))
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)
    assert summary_of(tree)["phases"][-1]["trainable_parameters"] == count
