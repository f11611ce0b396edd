"""`generate`: what a run's newest checkpoint makes of a text, against a loop over the trained model's own logits."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from helpers.trained_runs import PLANS, make_run
from sparse_llm_ft.cli.main import main
from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.evaluation import evaluator
from sparse_llm_ft.inference.generate import make_rows, unlabeled_example
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter

TEXTS = ["anna meets tom", "the red cake"]


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    main(["generate", *arguments])
    return capsys.readouterr().out


@torch.no_grad()
def greedy(model: nn.Module, tokenizer: Any, prompt: str, new: int) -> str:
    """The most probable tokens one after the other, without cache; ends with the end-of-sequence token."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + new:
        ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", ["ranked", "grouped", "masked_in_optimizer", "vera", "adalora", "full"])
def test_completions_are_those_of_the_trained_model(name: str, settings: dict, capsys) -> None:
    model = make_run(settings, PLANS[name])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"]["name"])
    printed = run(settings["output_dir"], *TEXTS, "--max-new-tokens", "6", capsys=capsys)
    assert printed.splitlines() == [greedy(model, tokenizer, f"{text} ?", 6) for text in TEXTS]
    assert printed.strip(), "something is written"


def test_a_chat_tokenizer_sees_its_template(settings: dict, loud_folder: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "chat"
    shutil.copytree(loud_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}book {{ m['content'] }} station{% endfor %}{% if add_generation_prompt %} :{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    settings["model"]["name"] = str(folder)
    model = make_run(settings, PLANS["lora"])
    printed = run(settings["output_dir"], TEXTS[0], "--max-new-tokens", "5", capsys=capsys)
    assert printed.strip() == greedy(model, tokenizer, f"book {TEXTS[0]} ? station :", 5)


def test_standard_input_is_one_text(settings: dict, capsys, monkeypatch) -> None:
    model = make_run(settings, PLANS["lora"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"]["name"])
    monkeypatch.setattr("sys.stdin", io.StringIO("anna buys\na cake\n"))
    printed = run(settings["output_dir"], "-", capsys=capsys)
    assert printed.strip() == greedy(model, tokenizer, "anna buys\na cake ?", 4)  # evaluation.max_new_tokens


@pytest.mark.parametrize(
    ("given", "message"),
    [(io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"), "is not utf-8"), (None, "standard input is closed")],
)
def test_standard_input_that_is_no_text_is_one_line(given: Any, message: str, settings: dict, capsys, monkeypatch):
    make_run(settings, PLANS["lora"])
    monkeypatch.setattr("sys.stdin", given)
    with pytest.raises(SystemExit) as stop:
        main(["generate", settings["output_dir"], "-"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and message in error


def test_more_tokens_than_the_model_has_positions_are_one_line_whatever_the_run_measures(
    settings: dict, loud_folder: Path, tmp_path: Path, capsys
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(loud_folder)
    folder = tmp_path / "gpt2"
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    ends = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings["model"]["name"], settings["evaluation"]["samples"] = str(folder), 0
    make_run(settings, AdapterPlan({"transformer.h.0.attn.c_attn": ModuleAdapter(4, 8.0)}))
    with pytest.raises(SystemExit) as stop:
        main(["generate", settings["output_dir"], "tom", "--max-new-tokens", "100"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "evaluation.max_new_tokens: 100" in error and "has 64 positions" in error


def test_the_data_need_not_be_there(settings: dict, data_folder: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(data_folder, tmp_path / "data")
    settings["task"]["path"] = str(tmp_path / "data")
    make_run(settings, PLANS["lora"])
    expected = run(settings["output_dir"], "tom", capsys=capsys)
    shutil.rmtree(tmp_path / "data")
    assert run(settings["output_dir"], "tom", capsys=capsys) == expected


def test_a_prompt_of_two_columns_takes_both(settings: dict, capsys) -> None:
    settings["task"]["prompt"] = "{text} : {answer}"
    settings["task"]["completion"] = "{text}"
    model = make_run(settings, PLANS["lora"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"]["name"])
    given = ["--column", "text=anna meets", "--column", "answer=tom"]
    both = run(settings["output_dir"], *given, capsys=capsys)
    assert both.strip() == greedy(model, tokenizer, "anna meets : tom", 4)
    assert run(settings["output_dir"], "tom", *given[:2], capsys=capsys) == both
    with pytest.raises(SystemExit) as stop:
        main(["generate", settings["output_dir"], "tom"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: expected --column text=TEXT --column answer=TEXT")


@pytest.mark.parametrize("encoder", [True, False])
def test_a_classification_prints_the_label(
    encoder: bool, settings: dict, encoder_folder: Path, labelled_folder: Path, capsys
) -> None:
    words = ["cake", "book"]
    settings["task"] = {
        "name": "custom",
        "path": str(labelled_folder),
        "prompt": "{sentence} ?",
        "labels": words,
        "max_length": 32,
    }
    if encoder:
        settings["model"]["name"] = str(encoder_folder)
    model = make_run(settings, None if encoder else PLANS["lora"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"]["name"])
    texts = [f"{a} {b} {c}" for a in ("anna", "tom") for b in ("buys", "meets") for c in ("red", "blue", "a cake")]
    expected = []
    with torch.no_grad():
        for text in texts:
            logits = model(**tokenizer(text if encoder else f"{text} ?", return_tensors="pt")).logits[0]
            first = tokenizer(words, add_special_tokens=False)["input_ids"]
            chosen = logits.argmax() if encoder else logits[-1, [ids[0] for ids in first]].argmax()
            expected.append(words[int(chosen)])
    assert run(settings["output_dir"], *texts, capsys=capsys).splitlines() == expected


def test_sampling_follows_its_settings(settings: dict, capsys, monkeypatch) -> None:
    """What was typed reaches the generation, and the run's own settings where nothing was."""
    make_run(settings | {"seed": 3}, PLANS["lora"])
    seen = {}

    def fake(model: Any, samples: Any, tokenizer: Any, options: Any, *world: int, **more: Any) -> list[str]:
        seen.update(options.model_dump(), **more)
        return ["" for _ in samples]

    monkeypatch.setattr(evaluator, "generate", fake)
    run(settings["output_dir"], "tom", "--temperature", "0.5", "--top-p", "0.9", "--seed", "11", capsys=capsys)
    assert (seen["temperature"], seen["top_p"], seen["seed"], seen["num_beams"]) == (0.5, 0.9, 11, 1)
    run(settings["output_dir"], "tom", "--num-beams", "3", capsys=capsys)
    assert (seen["temperature"], seen["num_beams"], seen["seed"]) == (0.0, 3, 3)
    assert (seen["max_new_tokens"], seen["seq2seq"], seen["synced"]) == (4, False, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tom", "--top-p", "2"], "evaluation.top_p"),
        (["tom", "--max-new-tokens", "0"], "evaluation.max_new_tokens"),
        ([], "expected a text: the task's input columns are text"),
        (["  "], "text 1: column text is empty"),
        (["tom", "\udcff"], "text 2: column 'text' holds half of a surrogate pair, which is no text"),
        (["tom", "--column", "answer=x"], "--column answer: the task's input columns are text"),
        (["tom", "--column", "text"], "--column text: expected NAME=TEXT"),
        (["tom", "--column", "text=anna"], "'tom': --column gives every column"),
    ],
)
def test_wrong_inputs_are_one_line(arguments: list[str], message: str, settings: dict, capsys) -> None:
    make_run(settings, PLANS["lora"])
    with pytest.raises(SystemExit) as stop:
        main(["generate", settings["output_dir"], *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"error: {message}")


def test_rows_are_made_of_texts_and_columns() -> None:
    assert make_rows(["a"], ["x", "y"], {}) == [{"a": "x"}, {"a": "y"}]
    assert make_rows(["a", "b"], ["x", "y"], {"b": "z"}) == [{"a": "x", "b": "z"}, {"a": "y", "b": "z"}]
    assert make_rows(["a", "b"], [], {"a": "x", "b": "z"}) == [{"a": "x", "b": "z"}]
    with pytest.raises(UserError, match="--column a=TEXT --column b=TEXT"):
        make_rows(["a", "b"], [], {})


def test_a_column_may_be_empty_where_it_may_be_in_training() -> None:
    alpaca = Task("t", None, "{instruction}\n{input}", "{output}")
    assert unlabeled_example(alpaca, {"instruction": "Sing.", "input": ""}, "text 1").prompt == "Sing.\n"
    with pytest.raises(UserError, match="text 1: column instruction, input is empty"):
        unlabeled_example(alpaca, {"instruction": " ", "input": ""}, "text 1")
    pair = Task("t", None, "{a} {b}", " {label}", labels=("no", "yes"), texts=("a", "b"))
    with pytest.raises(UserError, match="text 2: column b is empty"):
        unlabeled_example(pair, {"a": "x", "b": ""}, "text 2")
    plain = Task("t", None, "Write a poem.", "{poem}")  # a prompt without columns
    assert unlabeled_example(plain, {}, "text 1").prompt == "Write a poem."


def test_an_example_without_answer_shows_what_training_shows() -> None:
    labelled = Task("t", None, "Q: {q}", " {label}", labels=("no", "yes"), texts=("q",))
    example = unlabeled_example(labelled, {"q": "why"}, "text 1")
    assert (example.prompt, example.texts, example.completion) == ("Q: why", ("why",), " no")
    written = unlabeled_example(Task("t", None, "Q: {q}", "{a}"), {"q": "why"}, "text 1")
    assert (written.prompt, written.completion, written.label) == ("Q: why", "", None)
    scored = unlabeled_example(
        Task("t", None, "{a} {b}", " {s}", score=(0.0, 5.0), texts=("a", "b")), {"a": "1", "b": "2"}, ""
    )
    assert (scored.prompt, scored.texts, scored.label) == ("1 2", ("1", "2"), 0.0)
    chat = unlabeled_example(Task("t", None, None, None, messages="turns"), {"turns": "hello"}, "text 1")
    assert chat.messages == ({"role": "user", "content": "hello"},)
