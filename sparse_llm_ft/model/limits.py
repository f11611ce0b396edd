"""A model's limits: positions and embedding rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sparse_llm_ft.config import ModelConfig, RunConfig
from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.data.tokenization import usual_prompt_length
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.model.loading import load_tokenizer

_POSITIONS = ("position_embeddings", "embed_positions", "wpe")
_SCALED = ("linear", "dynamic", "yarn", "llama3", "longrope", "su")
"""Kinds of rotary embeddings that reach beyond the original positions; ``su`` is the old name of longrope."""

_BY_LENGTH = ("dynamic", "longrope", "su")
"""Those that depend on the length of the batch, once it exceeds the original positions."""

_SPECIAL = ("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id")


def tokenizer_for(config: ModelConfig, task_mode: TaskMode, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The model's tokenizer. For a model with a head, its `model_max_length` is at most the model's learned positions.

    Args:
        model: on any device.

    Raises:
        ConfigError: there is no usable tokenizer, or a special token has no embedding in the model.
    """
    tokenizer = load_tokenizer(config, task_mode)
    embeddings = model.get_input_embeddings()
    rows = getattr(embeddings, "num_embeddings", None)
    for name in _SPECIAL:
        number = getattr(tokenizer, name)
        if rows is not None and isinstance(number, int) and number >= rows:
            raise ConfigError(
                "model.name",
                f"{config.name!r} has a tokenizer whose {name} is {number}, but embeddings for {rows} tokens",
                "set model.resize_embeddings: true, or choose a model that was resized with its tokenizer",
            )
    limit = _learned_positions(model)
    if task_mode.has_head and limit is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return tokenizer


def check_lengths(config: RunConfig, task: Task, task_mode: TaskMode, model: PreTrainedModel) -> None:
    """Refuse samples and generated texts that are longer than the model's positions.

    A head needs no check: its texts are truncated to the model's limit (`tokenizer_for`).

    Raises:
        ConfigError: a setting is too large; the message names it.
    """
    _check_prompts(config, task_mode)
    if config.task.streaming and task_mode.mode == "question_answering":
        raise ConfigError("task.streaming", "true, but a context has several windows", "expected false")

    # Samples.
    settings = model.config.get_text_config()
    limit = positions(settings)
    if task_mode.has_head or limit is None:
        return
    if config.task.max_length > limit:
        raise ConfigError(
            "task.max_length",
            f"{config.task.max_length}, but {config.model.name!r} has {limit} positions",
            f"expected at most {limit}",
        )

    # Generated texts. A rotary model also computes beyond its positions, so they may be a little longer.
    if task.labels is not None or _rope(settings):
        return
    prompt = config.task.max_prompt_length or usual_prompt_length(config.task.max_length)
    behind = f" behind prompts of up to {prompt} tokens"
    if task_mode.mode == "seq2seq_lm":
        prompt, behind = 1, ""  # the start token
    new = config.evaluation.max_new_tokens
    if config.evaluation.samples and new + prompt > limit + 1:  # the last token needs no position
        raise ConfigError(
            "evaluation.max_new_tokens",
            f"{new}{behind}, but {config.model.name!r} has {limit} positions",
            f"expected at most {limit + 1 - prompt}" + (", or a smaller task.max_prompt_length" if behind else ""),
        )


def positions(settings: PreTrainedConfig) -> int | None:
    """How many positions a model with this config computes as in its own training; None: no limit.

    A rotary model whose positions are scaled has ``factor`` times its original positions, or more if its config says so
    (Llama 3.1). Where layers differ, the layers with most positions count: the others see a sliding window.

    Args:
        settings: of the model's text part.
    """
    limit = getattr(settings, "max_position_embeddings", None) or getattr(settings, "n_positions", None)
    if hasattr(settings, "relative_attention_num_buckets") or not isinstance(limit, int):  # T5: no limit
        return None
    return max([limit, *(_scaled_positions(settings, rope, limit) for rope in _rope(settings))])


def _scaled_positions(settings: PreTrainedConfig, rope: Mapping[str, Any], limit: int) -> int:
    """Factor times original positions, as transformers' `modeling_rope_utils` takes the two; 0 without scaling."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    factor = rope.get("factor")
    if kind not in _SCALED or not isinstance(factor, int | float):
        return 0
    own = getattr(settings, "original_max_position_embeddings", None)  # Phi 3 has it outside, and that one counts
    return int(factor * (own or rope.get("original_max_position_embeddings") or limit))


def longest_fixed_rotation(settings: PreTrainedConfig) -> int | None:
    """How many tokens a batch may have before its own length changes its rotary embeddings; None: any number.

    Args:
        settings: of the model's text part.
    """
    limits = []
    for rope in _rope(settings):
        if (rope.get("rope_type") or rope.get("type")) in _BY_LENGTH:
            own = getattr(settings, "original_max_position_embeddings", None)
            limits.append(own or rope.get("original_max_position_embeddings") or settings.max_position_embeddings)
    return min(limits, default=None)


def _rope(settings: PreTrainedConfig) -> list[Mapping[str, Any]]:
    """The model's rotary parameters, one entry for each type of layer that has its own; none without rotation.

    transformers 5 has them in `rope_parameters`; a config class from before, such as a model's own, in `rope_scaling`.
    """
    found = getattr(settings, "rope_parameters", None) or getattr(settings, "rope_scaling", None)
    if not isinstance(found, Mapping):
        return []
    nested = [part for part in found.values() if isinstance(part, Mapping)]
    return nested or [found]


def _check_prompts(config: RunConfig, task_mode: TaskMode) -> None:
    prompt, limit = config.task.max_prompt_length, config.task.max_length
    if prompt is None:
        return
    if task_mode.has_head:
        raise ConfigError(
            "task.max_prompt_length",
            f"{prompt}, but {config.model.name!r} gets a head",
            "expected task.max_length alone",
        )
    if prompt > limit or (prompt == limit and task_mode.mode != "seq2seq_lm"):
        raise ConfigError(
            "task.max_prompt_length",
            f"{prompt} leaves no room for a completion in task.max_length {limit}",
            "expected less",
        )


def _learned_positions(model: nn.Module) -> int | None:
    """Number of learned positions; None if the model has none."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _POSITIONS and isinstance(module, nn.Embedding):
            unused = int(getattr(module, "offset", 0))  # BART and OPT skip two rows
            if module.padding_idx is not None:  # RoBERTa and MPNet also skip the padding row
                unused += module.padding_idx + 1
            return module.num_embeddings - unused
    return None
