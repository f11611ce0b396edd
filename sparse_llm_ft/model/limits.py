"""What a model has room for: positions, and rows of its embeddings."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_llm_ft.config import ModelConfig, RunConfig
from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.data.tokenization import usual_prompt_length
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.model.loading import load_tokenizer

_POSITIONS = ("position_embeddings", "embed_positions", "wpe")
_SPECIAL = ("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id")


def tokenizer_for(config: ModelConfig, task_mode: TaskMode, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Before a head it also knows how long a text the model can take; many do not say.

    Args:
        model: on any device.

    Raises:
        ConfigError: none that can be used, or one with a special token that the model has no embedding for.
    """
    tokenizer = load_tokenizer(config, task_mode)
    embeddings = model.get_input_embeddings()
    rows = getattr(embeddings, "num_embeddings", None)
    for name in _SPECIAL:
        number = getattr(tokenizer, name)
        if rows is not None and isinstance(number, int) and number >= rows:
            raise ConfigError(
                "model.name",
                f"{config.name!r} has a tokenizer whose {name} is {number}, and embeddings for {rows} tokens",
                "expected a model whose embeddings were resized with its tokenizer",
            )
    limit = _learned_positions(model)
    if task_mode.has_head and limit is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return tokenizer


def check_lengths(config: RunConfig, task: Task, task_mode: TaskMode, model: PreTrainedModel) -> None:
    """Refuse samples, and texts that are written behind prompts, that a model has no positions for.

    A head's texts are cut to what the model can take (`tokenizer_for`).

    Raises:
        ConfigError: naming the setting.
    """
    _check_prompts(config, task_mode)
    if config.task.streaming and task_mode.mode == "question_answering":
        raise ConfigError("task.streaming", "true, and a context has several windows", "expected false")
    settings = model.config.get_text_config()
    relative = hasattr(settings, "relative_attention_num_buckets")  # T5: any distance will do
    limit = getattr(settings, "max_position_embeddings", None) or getattr(settings, "n_positions", None)
    if task_mode.has_head or relative or not isinstance(limit, int):
        return
    if config.task.max_length > limit:
        raise ConfigError(
            "task.max_length",
            f"{config.task.max_length}, and {config.model.name!r} has {limit} positions",
            f"expected at most {limit}",
        )
    if task.labels is not None or getattr(settings, "rope_parameters", None):
        return  # beyond its positions a rotary model computes on, and the text behind a prompt may be a little longer
    prompt = config.task.max_prompt_length or usual_prompt_length(config.task.max_length)
    behind = f" behind prompts of up to {prompt} tokens"
    if task_mode.mode == "seq2seq_lm":
        prompt, behind = 1, ""  # the start token
    new = config.evaluation.max_new_tokens
    if config.evaluation.samples and new + prompt > limit + 1:  # of the last token no position is asked
        raise ConfigError(
            "evaluation.max_new_tokens",
            f"{new}{behind}, and {config.model.name!r} has {limit} positions",
            f"expected at most {limit + 1 - prompt}" + (", or a smaller task.max_prompt_length" if behind else ""),
        )


def _check_prompts(config: RunConfig, task_mode: TaskMode) -> None:
    prompt, most = config.task.max_prompt_length, config.task.max_length
    if prompt is None:
        return
    if task_mode.has_head:
        raise ConfigError(
            "task.max_prompt_length",
            f"{prompt}, and {config.model.name!r} gets a head",
            "expected task.max_length alone",
        )
    if prompt > most or (prompt == most and task_mode.mode != "seq2seq_lm"):
        raise ConfigError(
            "task.max_prompt_length",
            f"{prompt} leaves no room for a completion in task.max_length {most}",
            "expected less",
        )


def _learned_positions(model: nn.Module) -> int | None:
    """Tokens that a table of positions has rows for; None without one."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _POSITIONS and isinstance(module, nn.Embedding):
            unused = int(getattr(module, "offset", 0))  # BART and OPT begin behind two rows
            if module.padding_idx is not None:  # and RoBERTa and MPNet behind that of padding
                unused += module.padding_idx + 1
            return module.num_embeddings - unused
    return None
