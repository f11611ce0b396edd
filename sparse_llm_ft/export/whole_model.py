"""A whole model in Hugging Face layout: its weights and everything that loading them needs."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.data.chat import ChatFormat
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.export.options import SHARD_SIZE
from sparse_llm_ft.export.read_back import WrittenWrongly, compare
from sparse_llm_ft.model.loading import DTYPES, load_complete, silence
from sparse_llm_ft.model.multimodal import is_multimodal

_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def save_whole_model(folder: Path, model: PreTrainedModel, context: RunContext, max_shard_size: str) -> None:
    """Write a loaded model with config, generation config, tokenizer, templates, and the base's own code, if any.

    Args:
        model: its config is replaced by the base's, without what loading and training have set.
    """
    _describe(model, context)
    with silence():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    _save_processors(folder, context)


def save_values(folder: Path, context: RunContext, values: Mapping[str, torch.Tensor]) -> None:
    """Write `values` as a model of the base's class, and read them back. Needs no network and no loaded model.

    Args:
        values: every parameter and persistent buffer by its name; a tied parameter may have one name.

    Raises:
        WrittenWrongly: a model loaded from the folder has other values.
    """
    model = _empty_copy(context)
    with torch.no_grad(), silence():
        model.save_pretrained(folder, state_dict=dict(values), max_shard_size=SHARD_SIZE)
    _save_processors(folder, context)
    check_values(folder, context, values)


def save_without_weights(folder: Path, context: RunContext) -> None:
    """Write what `save_values` writes beside the weights, and bring the empty weights into their stored form.

    Raises:
        Exception: whatever `save_values` would raise at the end of a run.
    """
    model = _empty_copy(context)
    with silence():
        model.save_pretrained(folder, state_dict={}, max_shard_size=SHARD_SIZE)
    _save_processors(folder, context)
    _stored_form(model)


def check_values(folder: Path, context: RunContext, values: Mapping[str, torch.Tensor]) -> None:
    """Load the model in `folder` on the CPU and compare every parameter and persistent buffer with `values`.

    Raises:
        WrittenWrongly: it cannot be loaded, or a value differs.
    """
    settings = context.config.model.model_copy(update={"name": str(folder), "revision": None, "quantization": "none"})
    try:
        loaded = load_complete(settings, context.task_mode, dtype=DTYPES[settings.dtype])
    except ConfigError as error:
        raise WrittenWrongly(str(error)) from error
    compare(loaded.state_dict(), values)


def _save_processors(folder: Path, context: RunContext) -> None:
    """Write the tokenizer, and of a multimodal base the settings of its image and sound processors, as they are."""
    context.tokenizer.save_pretrained(folder)
    for name in _PROCESSORS if is_multimodal(context.empty) else ():
        model = context.config.model
        # Loading the base does not fetch them, so this may; a base without one is complete without it.
        path = cached_file(
            model.name,
            name,
            revision=model.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is not None:
            shutil.copyfile(path, folder / name)


def _empty_copy(context: RunContext) -> PreTrainedModel:
    """The base on the meta device, described as it is to be stored."""
    model = copy.deepcopy(context.empty)
    nn.Module.to(model, DTYPES[context.config.model.dtype])  # transformers' own `to` refuses some models
    if model.can_generate() and (path := _generation_settings(context.config.model)) is not None:
        model.generation_config = GenerationConfig.from_pretrained(path.parent, path.name)
    _describe(model, context)
    return model


def _stored_form(model: PreTrainedModel) -> None:
    """Turn names and shapes into those of the model's files, as `save_pretrained` does (fused experts are split)."""
    from transformers.core_model_loading import revert_weight_conversion

    revert_weight_conversion(model, dict(model.state_dict()))


def _describe(model: PreTrainedModel, context: RunContext) -> None:
    """Give the model the config that its folder gets: the base's, with the task's labels and without quantisation. Its
    generation config lists the token that training has taught to end with.
    """
    config: PreTrainedConfig = copy.deepcopy(context.empty.config)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.__dict__.pop("quantization_config", None)
    if context.task_mode.has_head:  # a decoder's head finds each text's last token by the padding
        config.get_text_config().pad_token_id = context.tokenizer.pad_token_id
    labels = context.task.labels
    if labels is not None and config.num_labels == len(labels):
        config.id2label = dict(enumerate(labels))
        config.label2id = {word: i for i, word in enumerate(labels)}
    model.config = config
    if context.task_mode.mode == "causal_lm" and model.generation_config is not None:
        model.generation_config = settings = copy.deepcopy(model.generation_config)
        own = settings.eos_token_id
        ends = [] if own is None else own if isinstance(own, list) else [own]
        if (end := ChatFormat.of(context.tokenizer, context.config.task).end_token_id) not in ends:
            settings.eos_token_id = [*ends, end]  # those who generate stop at any of them


def _generation_settings(model: ModelConfig) -> Path | None:
    """The base's generation config, which decides how texts begin (BART) and end."""
    name = "generation_config.json"
    if Path(model.name).expanduser().is_dir():
        path = Path(model.name).expanduser() / name
        return path if path.is_file() else None
    cached = try_to_load_from_cache(model.name, name, revision=model.revision)  # cached when the base was loaded
    return Path(cached) if isinstance(cached, str) else None
