"""What models have room for: positions of a head's texts, of written ones, but embeddings for special tokens."""

from __future__ import annotations

import json
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
    Gemma3TextConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    RobertaConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sparse_llm_ft.config import ModelConfig, parse_config
from sparse_llm_ft.data.task_config import resolve_task
from sparse_llm_ft.data.tasks.mode import CAUSAL_LM, TaskMode
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.model.limits import _learned_positions, check_lengths, positions, tokenizer_for

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


ROPE: dict[str, tuple[dict, int]] = {
    "linear": ({"factor": 4.0}, 4 * 64),
    "dynamic": ({"factor": 2.0}, 2 * 64),
    "yarn": ({"factor": 4.0, "original_max_position_embeddings": 64}, 4 * 64),
    "yarn_of_fewer": ({"factor": 8.0, "original_max_position_embeddings": 48}, 8 * 48),
    "yarn_by_default": ({"factor": 2.0}, 2 * 64),
    "llama3": (
        {
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        8 * 64,
    ),
    "longrope": (
        {
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 16,
            "long_factor": [4.0] * 16,
        },
        4 * 64,
    ),
}
ROTARY = SIZES | {"hidden_size": 64, "max_position_embeddings": 64}


def rope_config(kind: str, key: str, name: str) -> LlamaConfig:
    scaling = {name: kind.partition("_")[0], **ROPE[kind][0]}
    theta = {"rope_theta": 10000.0}
    return LlamaConfig(**ROTARY, **({key: scaling} | theta if key == "rope_scaling" else {key: scaling | theta}))


@pytest.mark.parametrize("kind", ROPE)
@pytest.mark.parametrize(("key", "name"), [("rope_parameters", "rope_type"), ("rope_scaling", "type")])
def test_scaled_positions_are_those_that_transformers_computes(kind: str, key: str, name: str) -> None:
    """At the limit the slowest rotation has turned no further than an unscaled model's at its own."""
    config = rope_config(kind, key, name)
    limit = positions(config)
    assert limit == ROPE[kind][1]
    original = ROPE[kind][0].get("original_max_position_embeddings", 64)
    scaled, _ = ROPE_INIT_FUNCTIONS[kind.partition("_")[0]](config, "cpu", seq_len=limit)
    plain = 10000.0 ** -(torch.arange(0, 32, 2) / 32)
    turned, most = scaled[-1] * limit, plain[-1] * original
    assert turned <= most * 1.0001
    if kind != "dynamic":  # which leaves some room
        torch.testing.assert_close(turned, most)


def test_positions_that_the_config_declares_count_if_they_are_more() -> None:
    """Llama 3.1: 131,072 positions, of which factor times original are half."""
    rope = ROPE["llama3"][0] | {"rope_type": "llama3", "rope_theta": 10000.0}
    assert positions(LlamaConfig(**ROTARY | {"max_position_embeddings": 1024}, rope_parameters=rope)) == 1024


def test_original_positions_outside_of_the_rotary_parameters_count() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
    sizes = ROTARY | {"pad_token_id": 0, "original_max_position_embeddings": 32}
    assert positions(Phi3Config(**sizes, rope_parameters=rope)) == 64
    assert positions(Phi3Config(**sizes, rope_parameters=rope | {"factor": 4.0})) == 4 * 32


def test_layers_that_see_everything_count() -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = Gemma3TextConfig(**ROTARY, head_dim=32, rope_parameters=rope)
    assert positions(config) == 8 * 64


def test_other_positions_are_unscaled() -> None:
    assert positions(LlamaConfig(**ROTARY)) == 64
    assert positions(OPTConfig(**OPT, word_embed_proj_dim=16, max_position_embeddings=24)) == 24
    old = PreTrainedConfig()
    old.max_position_embeddings, old.rope_scaling = 64, {"type": "su", "factor": 2.0}
    assert positions(old) == 128


def test_a_base_extended_as_its_makers_say_takes_longer_samples(
    settings: dict, model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "extended"
    shutil.copytree(model_folder, folder)
    path = folder / "config.json"
    stored = json.loads(path.read_text())
    stored.pop("rope_parameters")
    stored |= {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    path.write_text(json.dumps(stored))
    settings["model"]["name"] = str(folder)
    for length, fits in ((256, True), (257, False)):
        settings["task"]["max_length"] = length
        config = parse_config(settings)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        if fits:
            check_lengths(config, resolve_task(config.task), CAUSAL_LM, model)
            continue
        with pytest.raises(ConfigError, match=r"task.max_length: 257, but .* has 256 positions; expected at most 256"):
            check_lengths(config, resolve_task(config.task), CAUSAL_LM, model)
