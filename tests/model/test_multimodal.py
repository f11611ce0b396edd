"""Multimodal checkpoints on a task of texts: which class loads them, and which of their modules get adapters."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel

from helpers.contexts import open_context
from helpers.fork_server import run_worlds
from helpers.forked_ranks import last_lines
from sparse_llm_ft.adapters import find_targets, linear_modules
from sparse_llm_ft.config import ModelConfig, parse_config
from sparse_llm_ft.data.tasks.mode import CAUSAL_LM
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.export.whole_model import check_values, save_whole_model
from sparse_llm_ft.inference.trained_run import read_run
from sparse_llm_ft.model.architecture import auto_class, mode_of
from sparse_llm_ft.model.buffers import fixed_parameters
from sparse_llm_ft.model.loading import empty_model, load_model, set_use_cache
from sparse_llm_ft.model.multimodal import text_modules, unreached
from sparse_llm_ft.training.records import describe_phase

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
IMAGES = {"image_token_id": 40, "image_token_index": 40}


def gemma3() -> PreTrainedConfig:
    text = TEXT | {"query_pre_attn_scalar": 8, "sliding_window": 16, "model_type": "gemma3_text"}
    vision = VISION | {"model_type": "siglip_vision_model"}
    tokens = {"boi_token_index": 41, "eoi_token_index": 42, "image_token_index": 40}
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)


def llava(text: str = "llama", **settings: Any) -> PreTrainedConfig:
    vision = VISION | {"model_type": "clip_vision_model"}
    return transformers.LlavaConfig(
        text_config=TEXT | {"model_type": text}, vision_config=vision, image_token_index=40, **settings
    )


def mistral3() -> PreTrainedConfig:
    vision = VISION | {"model_type": "pixtral", "head_dim": 8}
    return transformers.Mistral3Config(
        text_config=TEXT | {"model_type": "mistral"}, vision_config=vision, image_token_index=40
    )


def idefics3() -> PreTrainedConfig:
    vision = VISION | {"model_type": "idefics3_vision"}
    return transformers.Idefics3Config(
        text_config=TEXT | {"model_type": "llama"}, vision_config=vision, image_token_id=40, pad_token_id=0
    )


def qwen2_vl() -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
    return transformers.Qwen2VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision, **IMAGES)


def mllama() -> PreTrainedConfig:
    vision = VISION | {
        "attention_heads": 2,
        "num_global_layers": 1,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
        "max_num_tiles": 1,
    }
    return transformers.MllamaConfig(
        text_config=TEXT | {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default"}},
        vision_config=vision,
        image_token_index=40,
    )


def qwen2_audio() -> PreTrainedConfig:
    audio = {
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "num_mel_bins": 8,
        "model_type": "qwen2_audio_encoder",
    }
    return transformers.Qwen2AudioConfig(
        text_config=TEXT | {"model_type": "qwen2"}, audio_config=audio, audio_token_index=40
    )


KINDS = {
    "gemma3": (gemma3, "model.language_model.layers"),
    "llava": (llava, "model.language_model.layers"),
    "mistral3": (mistral3, "model.language_model.layers"),
    "idefics3": (idefics3, "model.text_model.layers"),
    "qwen2_vl": (qwen2_vl, "model.language_model.layers"),
    "mllama": (mllama, "model.language_model.layers"),
    "qwen2_audio": (qwen2_audio, "model.language_model.layers"),
}
"""Each names the stack of its language model."""


def empty(settings: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForMultimodalLM.from_config(settings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_reaches_the_language_model_alone(kind: str) -> None:
    make, stack = KINDS[kind]
    model = empty(make())
    assert mode_of(model) == "causal_lm"
    reached = text_modules(model, kind)
    assert reached is not None
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = find_targets(model, "all-linear", reached)
    text = {name for name in linear if name.startswith(stack)}
    if kind == "mllama":  # no text enters the layers that look at the image
        assert {name for name in text if name.startswith(f"{stack}.1.")} and len(targets) == 7
        text = {name for name in text if name.startswith(f"{stack}.0.")}
    assert set(targets) == text and len(linear - text) > 1
    assert not any(part in name for name in targets for part in ("vision", "visual", "audio", "projector"))


@pytest.mark.parametrize("target_modules", [["q_proj"], r".*\.q_proj"])
def test_endings_and_patterns_mean_the_language_model_too(target_modules: Any) -> None:
    model = empty(gemma3())
    assert sum(name.endswith("q_proj") for name, _ in model.named_modules()) == 3
    targets = find_targets(model, target_modules, text_modules(model, "gemma3"))
    assert list(targets) == [f"model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def test_what_no_text_reaches_is_named_by_its_outermost_modules() -> None:
    model = empty(mllama())
    reached = text_modules(model, "mllama")
    assert reached is not None
    assert unreached(linear_modules(model), reached) == [
        "model.vision_model",
        "model.language_model.layers.1",
        "model.multi_modal_projector",
    ]


def test_a_decoder_whose_pass_fails_without_values_counts_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = empty(gemma3())
    expected = find_targets(model, "all-linear", text_modules(model, "gemma3"))

    def read_values(*_: object, **__: object) -> None:
        raise NotImplementedError("Cannot copy out of meta tensor")

    monkeypatch.setattr(model.model.language_model.layers[1], "forward", read_values)
    assert find_targets(model, "all-linear", text_modules(model, "gemma3")) == expected


def test_a_model_that_needs_an_image_is_refused_in_one_line() -> None:
    settings = transformers.Blip2Config(
        text_config=TEXT | {"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 32},
        vision_config=VISION,
        qformer_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    )
    with pytest.raises(ConfigError, match=r"model\.name: 'blip' is a blip-2 model, which takes no text alone"):
        text_modules(empty(settings), "blip")


def test_a_model_of_text_alone_is_reached_everywhere(model_folder: Path) -> None:
    assert text_modules(empty_model(ModelConfig(name=str(model_folder))), "llama") is None


def test_a_checkpoint_is_loaded_as_what_it_was_saved_as() -> None:
    """Of Llama 4 and Mllama, `AutoModelForCausalLM` would load the language model alone."""
    settings = mllama()
    assert auto_class(settings, "causal_lm") is AutoModelForCausalLM
    settings.architectures = ["MllamaForConditionalGeneration"]
    assert auto_class(settings, "causal_lm") is AutoModelForMultimodalLM
    assert auto_class(llava(), "causal_lm") is AutoModelForMultimodalLM
    assert auto_class(AutoConfig.for_model("llama"), "causal_lm") is AutoModelForCausalLM


@pytest.fixture
def gemma3_folder(model_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "gemma3"
    torch.manual_seed(0)
    AutoModelForMultimodalLM.from_config(gemma3()).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, folder / name)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    return folder


def test_use_cache_is_the_language_models(gemma3_folder: Path) -> None:
    loaded = load_model(ModelConfig(name=str(gemma3_folder), dtype="float32"))
    assert loaded.config.text_config.use_cache is False and not hasattr(loaded.config, "use_cache")
    set_use_cache(loaded, True)
    assert loaded.config.text_config.use_cache is True
    with torch.device("meta"):
        encoder = transformers.DistilBertModel(transformers.DistilBertConfig(n_layers=1))
    set_use_cache(encoder, True)  # there is none to set
    assert not hasattr(encoder.config, "use_cache")


def test_a_run_logs_what_gets_no_adapters(settings: dict, gemma3_folder: Path, capsys: Any) -> None:
    settings["model"]["name"] = str(gemma3_folder)
    context = open_context(parse_config(settings))
    assert Counter(name.split(".")[1] for name in context.targets) == {"language_model": 14}
    assert context.task_mode == CAUSAL_LM
    assert "a text does not reach model.vision_tower of " in capsys.readouterr().out


def test_full_trains_what_a_text_reaches_and_keeps_no_state_for_the_rest(
    settings: dict, gemma3_folder: Path, tmp_path: Path
) -> None:
    settings["model"]["name"] = str(gemma3_folder)
    settings |= {"method": {"name": "full"}, "deepspeed": {"zero_stage": 3}}
    settings["training"] |= {"weight_decay": 0.1, "max_steps": 2}
    towers = ("model.vision_tower.", "model.multi_modal_projector.")
    context = open_context(parse_config(settings))
    names = [name for name, _ in context.empty.named_parameters()]
    kept = {name for name in names if name.startswith(towers)}
    assert fixed_parameters(context.empty) == kept and len(kept) > 20
    count = sum(p.numel() for name, p in context.empty.named_parameters() if name not in kept)
    assert describe_phase(context, context.first_phase())[-1] == f"{count:,} trainable parameters"
    statuses = run_worlds({"run": {"trees": settings, "world_size": 2}}, tmp_path / "logs")
    assert statuses == {"run": [0, 0]}, last_lines(tmp_path / "logs" / "run")
    folder = Path(settings["output_dir"])
    state = read_run(str(folder)).state
    assert set(state.tensors) == set(state.moments) == set(names) - kept
    before, after = (load_file(path / "model.safetensors") for path in (gemma3_folder, folder / "model"))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if any(part.split(".")[1] in name for part in towers)}


def test_a_whole_model_is_written_as_its_base_was(settings: dict, gemma3_folder: Path, tmp_path: Path) -> None:
    settings["model"]["name"] = str(gemma3_folder)
    context = open_context(parse_config(settings))
    model = load_model(context.config.model)
    save_whole_model(tmp_path / "whole", model, context, "5GB")
    check_values(tmp_path / "whole", context, model.state_dict())
    written, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", gemma3_folder))
    assert written.keys() == before.keys() and all(torch.equal(written[name], before[name]) for name in before)
    assert AutoConfig.from_pretrained(tmp_path / "whole").text_config.use_cache is True
    assert (tmp_path / "whole" / "preprocessor_config.json").is_file()
