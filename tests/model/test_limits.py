"""What models have room for: positions of a head's texts, of written ones, but embeddings for special tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    DebertaV2Config,
    OPTConfig,
    RobertaConfig,
)

from sparse_llm_ft.config import ModelConfig, parse_config
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.data.tasks.mode import CAUSAL_LM, TaskMode
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.model.limits import _learned_positions, check_lengths, tokenizer_for

HEAD = TaskMode("sequence_classification", 2)
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
OPT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
BART = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (BertConfig(**SIZES, max_position_embeddings=24), 24),
        (RobertaConfig(**SIZES, max_position_embeddings=26, pad_token_id=1), 24),
        (DebertaV2Config(**SIZES, position_biased_input=False, relative_attention=True), None),
        (OPTConfig(**OPT, word_embed_proj_dim=16, max_position_embeddings=24), 24),
        (BartConfig(**BART, max_position_embeddings=24), 24),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_positions_are_as_many_as_the_model_can_take(config, positions: int | None) -> None:
    model = AutoModel.from_config(config).eval()
    assert _learned_positions(model) == positions
    if positions is not None:
        model(torch.full((1, positions), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, positions + 1), 5))


def test_a_head_is_shown_no_more_than_the_model_can_take(encoder_folder: Path) -> None:
    model = AutoModel.from_config(AutoConfig.from_pretrained(encoder_folder))
    config = ModelConfig(name=str(encoder_folder))
    limit = model.config.max_position_embeddings
    assert AutoTokenizer.from_pretrained(encoder_folder).model_max_length > limit
    assert tokenizer_for(config, HEAD, model).model_max_length == limit


def test_a_special_token_without_embedding_is_refused(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "padded"
    shutil.copytree(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[MORE]"})
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with pytest.raises(ConfigError, match=r"model.name: .* whose pad_token_id is (\d+), but embeddings for \1 tokens"):
        tokenizer_for(ModelConfig(name=str(folder)), CAUSAL_LM, model)


@pytest.mark.parametrize(
    ("task_mode", "task", "new", "message"),
    [
        (CAUSAL_LM, {"max_length": 25}, 4, "task.max_length: 25, but .* has 24 positions; expected at most 24"),
        (CAUSAL_LM, {"max_length": 24}, 8, "evaluation.max_new_tokens: 8 behind prompts of up to 18 tokens"),
        (CAUSAL_LM, {"max_length": 24}, 7, None),
        (CAUSAL_LM, {"max_length": 24, "max_prompt_length": 10}, 15, None),
        (CAUSAL_LM, {"max_length": 24, "labels": ["a", "b"], "completion": None}, 64, None),
        (CAUSAL_LM, {"max_length": 24, "max_prompt_length": 24}, 1, "max_prompt_length: 24 leaves no room for a compl"),
        (TaskMode("seq2seq_lm"), {"max_length": 24, "max_prompt_length": 24}, 24, None),
        (HEAD, {"max_length": 99, "labels": ["a", "b"], "completion": None}, 64, None),
        (HEAD, {"max_length": 24, "max_prompt_length": 9}, 1, "task.max_prompt_length: 9, but .* gets a head"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(
    task_mode: TaskMode, task: dict, new: int, message: str | None, settings: dict
) -> None:
    settings["task"] |= task
    settings["evaluation"]["max_new_tokens"] = new
    config = parse_config(settings)
    model = AutoModelForCausalLM.from_config(OPTConfig(**OPT, word_embed_proj_dim=16, max_position_embeddings=24))
    if message is None:
        check_lengths(config, resolve_task(config.task), task_mode, model)
        return
    with pytest.raises(ConfigError, match=message):
        check_lengths(config, resolve_task(config.task), task_mode, model)
