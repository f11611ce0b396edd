"""Tokens that a user added as special are text in predictions and references; the tokenizer's own are in neither."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from sparse_llm_ft.config import EvaluationConfig, TaskConfig
from sparse_llm_ft.data.dataset import EvalSplit
from sparse_llm_ft.data.rows import Example
from sparse_llm_ft.data.samples import Sample
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.data.tasks.mode import CAUSAL_LM
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.evaluation import evaluator as module
from sparse_llm_ft.evaluation.control_tokens import ControlTokens
from sparse_llm_ft.evaluation.evaluator import Evaluator
from sparse_llm_ft.evaluation.generation import generate
from sparse_llm_ft.io.console import Console


@pytest.fixture
def tokenizer(model_folder: Path) -> Any:
    found = AutoTokenizer.from_pretrained(model_folder)
    found.add_special_tokens({"additional_special_tokens": ["<SQL>", "</SQL>"], "pad_token": "<pad>"})
    return found


class Speaker(nn.Module):
    """Generates the given tokens, whatever its prompt."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__()
        self.weight, self.tokens = nn.Parameter(torch.zeros(1)), tokens
        self.config, self.generation_config = LlamaConfig(), GenerationConfig()

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([self.tokens] * len(input_ids))], 1)


def test_a_users_special_tokens_are_text_and_control_tokens_are_not(tokenizer) -> None:
    control = ControlTokens.of(tokenizer)
    words = tokenizer("<SQL>red book</SQL>", add_special_tokens=False)["input_ids"]
    kept = tokenizer.decode(words)
    assert "<SQL>" in kept and "</SQL>" in kept
    surrounded = [tokenizer.bos_token_id, *words[:2], tokenizer.pad_token_id, *words[2:], tokenizer.eos_token_id]
    assert control.decode(surrounded) == kept
    assert control.strip(f"{tokenizer.bos_token}<SQL>red book</SQL> {tokenizer.eos_token}") == "<SQL>red book</SQL>"
    assert control.ids <= set(tokenizer.all_special_ids) and not control.ids & set(words)


def test_what_the_tokenizer_puts_around_every_text_is_no_text(tokenizer) -> None:
    language = tokenizer.convert_tokens_to_ids("<SQL>")
    assert ControlTokens.of(tokenizer, [language, None]).decode([language, language]) == ""


def test_spaces_before_punctuation_stay_as_they_are_in_references() -> None:
    """Whatever the tokenizer's settings say: E2E and XSum are written like this."""
    words = ["<unk>", "</s>", *(f"\u2581{word}" for word in ("we", "do", "n't", "go", "."))]
    backend = Tokenizer(Unigram([(word, 0.0) for word in words], unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    cleaning = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=True
    )
    text = "we do n't go ."
    assert cleaning.decode(cleaning(text)["input_ids"]) != text
    assert ControlTokens.of(cleaning).decode(cleaning(text)["input_ids"]) == text


def test_a_perfect_model_with_tags_is_right(tokenizer, tmp_path: Path, monkeypatch) -> None:
    words = tokenizer("<SQL>red book</SQL>", add_special_tokens=False)["input_ids"]
    model = Speaker([*words, tokenizer.eos_token_id])
    settings = EvaluationConfig(max_new_tokens=len(words) + 1)
    text = generate(model, [Sample((1, 5), (2,))], tokenizer, settings, 0, 1, synced=False)
    assert text == [tokenizer.decode(words).strip()]

    task = resolve_task(
        TaskConfig(name="custom", path=str(tmp_path), prompt="{q}", completion="{a}", metrics=("squad", "bleu"))
    )
    row = Example("anna", "x", (f"<SQL>red book</SQL>{tokenizer.eos_token}",))
    part = EvalSplit("", [row], [Sample((1, 5), (2,))])
    monkeypatch.setattr(module, "mean_loss", lambda *_: 0.0)
    monkeypatch.setattr(module, "run_on_rank_zero", lambda _, action: action())
    objective: Any = SimpleNamespace()
    run = Evaluator(settings, task, CAUSAL_LM, [part], tokenizer, objective, World(0, 1, 0, 1), 0, 0, Console(1))
    assert run(model, tmp_path / "predictions.jsonl")["exact_match"] == 100
    (line,) = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["prediction"] == text[0]
    assert json.loads(line)["references"] == ["<SQL>red book</SQL>"]
