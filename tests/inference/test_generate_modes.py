"""`generate` on runs of an encoder-decoder, of a regression and of spans, against the trained model's own outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from helpers.tiny_modes import ANSWERS, LABELLED, SCORED, SUMMARIES, UNANSWERABLE, make_bart, make_t5
from helpers.trained_runs import make_run
from sparse_llm_ft.cli.main import main
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter

TEXTS = ["anna meets tom", "the red cake in the park", "tom buys a book : blue"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    main(["generate", *arguments])
    return capsys.readouterr().out.splitlines()


def on_task(settings: dict, model: Path, task: Any, tmp_path: Path, endings: tuple[str, ...] | None) -> nn.Module:
    """The run's trained model; its data are not there.

    Args:
        endings: of the modules with adapters; None: those of an encoder, beside its head.
    """
    settings["model"]["name"] = str(model)
    settings["task"] = {**task, "path": str(tmp_path)}
    plan = None
    if endings is not None:
        names = [f"{stack}.block.{i}.{end}" for stack in ("encoder", "decoder") for i in range(2) for end in endings]
        plan = AdapterPlan({name: ModuleAdapter(4, 8.0) for name in names})
    return make_run(settings, plan)


@pytest.fixture
def t5_folder(tmp_path: Path) -> Path:
    """The tiny T5 with weights of which some texts are long."""
    (tmp_path / "t5").mkdir()
    make_t5(tmp_path / "t5")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5")
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.6, generator=generator)
    model.save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


@torch.no_grad()
def greedy(model: nn.Module, tokenizer: Any, prompt: str, new: int) -> str:
    """The most probable tokens one after the other, everything computed anew."""
    seen, written = tokenizer(prompt, return_tensors="pt")["input_ids"], [model.config.decoder_start_token_id]
    while len(written) <= new:
        written.append(int(model(seen, decoder_input_ids=torch.tensor([written])).logits[0, -1].argmax()))
        if written[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(written, skip_special_tokens=True).strip()


QUERIES = ("layer.0.SelfAttention.q", "layer.0.SelfAttention.o")


def test_an_encoder_decoder_writes_what_its_loop_does(settings: dict, t5_folder: Path, tmp_path: Path, capsys) -> None:
    model = on_task(settings, t5_folder, SUMMARIES, tmp_path, QUERIES)
    tokenizer = AutoTokenizer.from_pretrained(t5_folder)
    expected = [greedy(model, tokenizer, f"{text} ?", 5) for text in TEXTS]
    assert any(expected)
    assert printed(capsys, settings["output_dir"], *TEXTS, "--max-new-tokens", "5") == expected


def test_an_encoder_decoder_prints_the_label_word(settings: dict, t5_folder: Path, tmp_path: Path, capsys) -> None:
    model = on_task(settings, t5_folder, LABELLED, tmp_path, QUERIES)
    tokenizer = AutoTokenizer.from_pretrained(t5_folder)
    words = tokenizer.convert_tokens_to_ids(["cake", "book"])
    texts = [f"{a} {b} {c}" for a in ("anna", "tom") for b in ("buys", "meets") for c in ("red", "blue", "a cake")]
    expected = []
    with torch.no_grad():
        for text in texts:
            seen = tokenizer(f"{text} ?", return_tensors="pt")["input_ids"]
            logits = model(seen, decoder_input_ids=torch.tensor([[0]])).logits[0, 0]
            expected.append(("cake", "book")[int(logits[words].argmax())])
    assert printed(capsys, settings["output_dir"], *texts) == expected


def test_a_regression_prints_the_heads_score_of_both_texts(
    settings: dict, encoder_folder: Path, tmp_path: Path, capsys
) -> None:
    model = on_task(settings, encoder_folder, SCORED, tmp_path, None)
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    with torch.no_grad():
        expected = [
            f"{float(model(**tokenizer(text, 'the red book', return_tensors='pt')).logits):.3f}" for text in TEXTS
        ]
    assert len(set(expected)) == 3
    assert printed(capsys, settings["output_dir"], *TEXTS, "--column", "second=the red book") == expected
    with pytest.raises(SystemExit) as stop:
        main(["generate", settings["output_dir"], "tom"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: expected --column first=TEXT --column second=TEXT")


@pytest.mark.parametrize("task", [ANSWERS, UNANSWERABLE], ids=lambda task: task["name"])
def test_an_answer_is_cut_from_the_context(
    task: Any, settings: dict, encoder_folder: Path, tmp_path: Path, capsys
) -> None:
    """The best pair of the context's tokens; where a question may have none, the empty line if that is likelier."""
    settings["seed"] = 3  # a head for which some questions have no answer, if they may
    model = on_task(settings, encoder_folder, task | {"max_length": 64}, tmp_path, None)
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    questions = ["anna in ?", "tom ?", "where is the book ?", "red ?", "a cake in the station ?", "park"]
    context = "anna  meets tom in the park . the book : red"
    expected = []
    with torch.no_grad():
        for question in questions:
            encoded = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
            offsets, kinds = encoded.pop("offset_mapping")[0].tolist(), encoded.sequence_ids(0)
            output = model(**encoded)
            starts, ends = output.start_logits[0].tolist(), output.end_logits[0].tolist()
            inside = [i for i, kind in enumerate(kinds) if kind == 1]
            pairs = [(starts[i] + ends[j], offsets[i][0], offsets[j][1]) for i in inside for j in inside if i <= j]
            score, first, last = max(pairs)
            none = task["name"] == "squad_v2" and starts[0] + ends[0] > score
            expected.append("" if none else context[first:last])
    assert len(set(expected)) > 1 and ("" in expected) == (task["name"] == "squad_v2")
    assert printed(capsys, settings["output_dir"], *questions, "--column", f"context={context}") == expected


def test_bart_begins_with_the_token_it_is_made_to(settings: dict, tmp_path: Path, capsys) -> None:
    (tmp_path / "bart").mkdir()
    make_bart(tmp_path / "bart")
    settings["model"]["name"] = str(tmp_path / "bart")
    settings["task"] = {**SUMMARIES, "path": str(tmp_path)}
    names = [f"model.{stack}.layers.{i}.fc1" for stack in ("encoder", "decoder") for i in range(2)]
    model = make_run(settings, AdapterPlan({name: ModuleAdapter(4, 8.0) for name in names}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bart")
    expected = []
    with torch.no_grad():
        for text in TEXTS:
            seen, written = tokenizer(f"{text} ?", return_tensors="pt")["input_ids"], [2, 1]
            while len(written) < 6 and (len(written) == 2 or written[-1] != 2):
                written.append(int(model(seen, decoder_input_ids=torch.tensor([written])).logits[0, -1].argmax()))
            expected.append(tokenizer.decode(written, skip_special_tokens=True).strip())
    assert printed(capsys, settings["output_dir"], *TEXTS, "--max-new-tokens", "5") == expected
    with pytest.raises(SystemExit) as stop:
        main(["generate", settings["output_dir"], "tom", "--max-new-tokens", "200"])
    assert stop.value.code == 2
    assert "error: evaluation.max_new_tokens: 200, but " in (said := capsys.readouterr().err)
    assert said.endswith("has 64 positions; expected at most 64\n")
