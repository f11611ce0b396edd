"""Chooses the objective for a task and a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn
from unittest.mock import patch

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, masking_utils

from sparse_llm_ft.data.tasks import Task, render
from sparse_llm_ft.data.tokenization import completion_ids, target_ids
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.model.architecture import base_of, decoder_start_token, mode_of
from sparse_llm_ft.objectives.base import Objective
from sparse_llm_ft.objectives.classification import ClassificationObjective, RegressionObjective
from sparse_llm_ft.objectives.language_modeling import CompletionObjective, LabelWords, Seq2SeqObjective
from sparse_llm_ft.objectives.spans import SpanObjective


def build_objective(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, end_token_id: int | None = None
) -> Objective[Any]:
    """The objective of `task` on `model`. Reads the model's class and config only, so `empty_model` suffices.

    Args:
        end_token_id: ends a decoder's completions; None is the end-of-sequence token.

    Raises:
        ConfigError: one token does not distinguish all label words.
    """
    assert isinstance(tokenizer.pad_token_id, int), "load_tokenizer made sure"
    pad, mode, base = tokenizer.pad_token_id, mode_of(model), base_of(model)
    if mode == "sequence_classification":
        return ClassificationObjective(pad) if task.labels is not None else RegressionObjective(pad)
    if mode == "question_answering":
        return SpanObjective(pad)
    words = _label_words(
        tokenizer, task, target_ids if mode == "seq2seq_lm" else partial(completion_ids, end=end_token_id)
    )
    if mode == "seq2seq_lm":
        assert isinstance(base, PreTrainedModel)
        return Seq2SeqObjective(pad, False, words, start_token_id=decoder_start_token(base.config, pad))
    accepted = inspect.signature(base.forward).parameters
    flash = "flash" in str(getattr(getattr(base, "config", None), "_attn_implementation", None))
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    return CompletionObjective(pad, "logits_to_keep" in accepted, words, flash, flash and passes_on)


def check_packing(model: PreTrainedModel) -> None:
    """Refuse ``task.packing`` if packed samples would attend to each other.

    transformers separates them by their positions if the model derives its attention mask from them, its attention
    implementation uses that mask, and no layer carries a state from token to token.

    Args:
        model: `empty_model` suffices.

    Raises:
        ConfigError: the model cannot separate packed samples; the message says why.
    """
    settings: Any = model.config.get_text_config()
    kind, attention = settings.model_type, settings._attn_implementation
    layers = getattr(settings, "layer_types", None) or ()
    others = [layer for layer in layers if "attention" not in layer or layer == "linear_attention"]
    reason = None
    if mode_of(model) != "causal_lm":
        reason = "the model is not a causal language model"
    elif "position_ids" not in inspect.signature(model.forward).parameters:
        reason = f"a {kind} model does not take positions"
    elif others or model._is_stateful:
        reason = f"a {kind} model has stateful layers"
    elif attention not in ("sdpa", "eager") and "flash" not in attention:  # for flash attention see `packs_in_one_row`
        reason = f"{attention!r} attention lets packed samples attend to each other"
    elif not _masks_by_positions(model):
        reason = f"a {kind} model lets packed samples attend to each other"
    if reason:
        raise ConfigError("task.packing", f"true, but {reason}", "expected false")


class _PackingDetected(Exception):
    """transformers has looked for packed samples."""


def _masks_by_positions(model: PreTrainedModel) -> bool:
    """Whether the model's forward pass calls transformers' search for packed samples before its first layer. OPT and
    gpt-oss, for instance, take positions but ignore them in their masks.
    """

    def detected(position_ids: torch.Tensor) -> NoReturn:
        raise _PackingDetected

    ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    with patch.object(masking_utils, "find_packed_sequence_indices", detected), torch.no_grad():
        try:  # embeddings, since GPT-2 reads the values of token ids
            embedded = model.get_input_embeddings()(ids)
            model(inputs_embeds=embedded, position_ids=torch.zeros_like(ids), use_cache=False)
        except _PackingDetected:
            return True
        except Exception:  # an empty model fails only after it has built its mask
            return False
    return False


def _label_words(
    tokenizer: PreTrainedTokenizerBase, task: Task, write: Callable[[str, PreTrainedTokenizerBase], list[int]]
) -> LabelWords | None:
    """Each label's token at the first position where the labels' completions differ."""
    if task.labels is None:
        return None
    assert task.completion, "resolve_task made sure"
    rows = [write(render(task.completion, {task.label_column: word}), tokenizer) for word in task.labels]
    position = next((i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), 0)
    tokens: dict[int, str] = {}
    for word, row in zip(task.labels, rows, strict=True):
        token = row[position]
        if token in tokens:
            raise ConfigError(
                "task.labels",
                f"{tokens[token]!r} and {word!r} both continue with the token {tokenizer.decode([token])!r}",
                "expected label words whose completions all differ at one token",
            )
        tokens[token] = word
    return LabelWords(torch.tensor(list(tokens)), position)
