"""``model.resize_embeddings``: rows of the embeddings and of the output head for tokens that were added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.errors import ConfigError, reason_of

_SETTING = "model.resize_embeddings"
_NEW = "_sparse_llm_ft_new_rows"
"""Attribute of a model: the rows that its embeddings have grown by."""


def grow_embeddings(
    model: PreTrainedModel,
    rows: int,
    seed: int = 0,
    take: Callable[[nn.Parameter], torch.Tensor] = lambda parameter: parameter.detach(),
    place: Callable[[nn.Parameter], None] = lambda parameter: None,
) -> None:
    """transformers' `resize_token_embeddings` to `rows` tokens; a larger table stays as it is.

    New rows are drawn around the mean of the old ones, with their covariance times 1e-9 (Hewitt 2021), on the CPU and
    from `seed` alone: on every rank and machine as ``torch.manual_seed(seed); model.resize_token_embeddings(rows)``
    draws them after `from_pretrained`. On the meta device only shapes change. For the covariance a process holds a
    table twice in float32.

    Args:
        take: returns a parameter's full values; collective where parameters are sharded.
        place: brings a grown parameter, which lies on the CPU, to where it belongs.
    """
    before = _rows_of(model)
    if rows <= before:
        return
    empty = model.get_input_embeddings().weight.is_meta
    for parameter in _tables(model):
        whole = nn.Parameter(take(parameter).to(parameter.device if empty else "cpu", copy=True), requires_grad=False)
        _replace(model, parameter, whole)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.resize_token_embeddings(rows, mean_resizing=not empty)
    for parameter in _tables(model):
        parameter.requires_grad_(False)
        place(parameter)
    setattr(model, _NEW, range(before, rows))


def new_rows(model: nn.Module) -> range:
    """The rows that `grow_embeddings` has added."""
    found: range = getattr(model, _NEW, range(0))
    return found


def resized(model: PreTrainedModel, config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The base on the meta device, with an embedding for each of the tokenizer's tokens.

    Raises:
        ConfigError: transformers cannot resize this model.
    """
    before, wanted = _rows_of(model), token_count(tokenizer)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    try:
        grow_embeddings(model, wanted)
    except (NotImplementedError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            _SETTING,
            f"true, but transformers cannot resize {config.name!r} ({reason_of(error)})",
            "expected false, and a tokenizer without further tokens",
        ) from error
    head = model.get_output_embeddings()
    if _rows_of(model) < wanted or (head is not None and head.weight.shape[0] != _rows_of(model)):
        raise ConfigError(
            _SETTING,
            f"true, but {config.name!r} has embeddings for {before} tokens, and transformers does not resize them",
            "expected false, and a tokenizer without further tokens",
        )
    tables = {id(parameter) for parameter in _tables(model)}
    for name, parameter in model.named_parameters():
        if parameter.shape != shapes[name] and id(parameter) not in tables:
            raise ConfigError(
                _SETTING,
                f"true, but {config.name!r} has a further table by tokens, {name}",
                "expected a model that was resized and saved with transformers",
            )
    return model


def token_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many rows a table of embeddings needs for every token of the vocabulary."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _rows_of(model: PreTrainedModel) -> int:
    return int(getattr(model.get_input_embeddings(), "num_embeddings", 0))


def _tables(model: PreTrainedModel) -> list[nn.Parameter]:
    """The parameters that have a row for each token, each once: embeddings, an output head and its bias."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    found = [parameter for module in modules if module is not None for parameter in module.parameters(recurse=False)]
    return list({id(parameter): parameter for parameter in found}.values())


def _replace(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter in another's place in every module that has it."""
    for module in model.modules():
        owned: dict[str, Any] = module._parameters
        for name, parameter in owned.items():
            if parameter is old:
                owned[name] = new
