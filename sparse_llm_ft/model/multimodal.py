"""Multimodal checkpoints: which class loads them, and which of their modules a text reaches."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from sparse_llm_ft.errors import ConfigError, reason_of
from sparse_llm_ft.model.linear import linear_shape


def causal_lm_class(settings: PreTrainedConfig) -> type:
    """transformers' auto class that loads a decoder's whole checkpoint.

    A checkpoint with a tower for images or sound is loaded as such: `AutoModelForCausalLM` lacks most of these models,
    and of some (Llama 4, Mllama) it would load the language model alone.
    """
    kind = type(settings)
    if kind not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return AutoModelForCausalLM
    saved = getattr(settings, "architectures", None) or ()
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING and MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[kind.model_type] not in saved:
        return AutoModelForCausalLM
    return AutoModelForMultimodalLM


def is_multimodal(model: PreTrainedModel) -> bool:
    """Whether the model also takes something else than text."""
    settings = model.config
    if type(settings) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return True
    if getattr(settings, "is_encoder_decoder", False):
        return False  # its parts are an encoder and a decoder of text
    parts = [getattr(settings, name, None) for name in getattr(settings, "sub_configs", {})]
    text = settings.get_text_config(decoder=True)
    return any(part is not None and part is not text for part in parts)


def text_modules(model: PreTrainedModel, name: str) -> frozenset[str] | None:
    """The modules of a multimodal model that a text reaches; None for a model of text alone, where all do.

    They are the modules inside transformers' `get_decoder` that a forward pass of a text calls. The pass runs on the
    meta device. Where it cannot run to its end there (a layer reads values), all modules inside the decoder count.

    Args:
        model: the base on the meta device (`empty_model`).
        name: ``model.name``, for messages.

    Raises:
        ConfigError: the model takes no text without an image or sound.
    """
    if not is_multimodal(model):
        return None
    names = {id(module): path for path, module in model.named_modules()}
    decoder: nn.Module = model.get_decoder()
    whole = names.get(id(decoder), "")
    inside = {path for path in names.values() if not whole or path == whole or path.startswith(whole + ".")}
    called, failure = _called(model)
    linear = {path for path in inside if linear_shape(model.get_submodule(path)) is not None}
    if isinstance(failure, TypeError | ValueError) and not called & linear:
        reason = reason_of(failure, 200)
        raise ConfigError(
            "model.name",
            f"{name!r} is a {model.config.model_type} model, which takes no text alone ({reason})",
            "expected a language model, or a multimodal one that does",
        )
    head = names.get(id(model.get_output_embeddings()))
    complete = failure is None or head in called
    return frozenset(inside & called if complete else inside)


def unreached(names: Collection[str], reached: Collection[str]) -> list[str]:
    """The outermost modules without any of the `reached` names that hold all `names` which are not reached.

    Args:
        names: of layers with weights.
    """
    used = {part for name in names if name in reached for part in _parents(name)}
    found: dict[str, None] = {}
    for name in names:
        if name not in reached:
            found.setdefault(next(part for part in _parents(name) if part not in used))
    return list(found)


def unreached_parts(model: PreTrainedModel, name: str) -> list[str]:
    """The outermost modules of a multimodal model that a text does not reach: towers, projectors, layers that look at
    an image. Training a text changes none of their weights. None for a model of text alone.

    A single layer counts if it is linear; another one may be used by its parent without being called.

    Args:
        model, name: as in `text_modules`.
    """
    reached = text_modules(model, name)
    if reached is None:
        return []
    called, failure = _called(model)
    used, head = reached | (called if failure is None else set()), model.get_output_embeddings()
    names = []
    for path, module in model.named_modules():
        linear = linear_shape(module) is not None
        alone = not linear and (failure is not None or not any(True for _ in module.children()))
        by_parent = alone and path not in used and (failure is not None or path.rpartition(".")[0] in used)
        if module is not head and not by_parent and any(True for _ in module.parameters(recurse=False)):
            names.append(path)
    return unreached(names, used)


def _parents(name: str) -> list[str]:
    """The modules around a module, from the outermost, and itself."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _called(model: PreTrainedModel) -> tuple[set[str], Exception | None]:
    """The modules that a forward pass of a text calls, and what ended it before its end."""
    called: set[str] = set()

    def recorder(path: str) -> Callable[..., None]:
        return lambda *_: called.add(path)

    handles = [module.register_forward_pre_hook(recorder(path)) for path, module in model.named_modules()]
    ids = torch.zeros((1, 4), dtype=torch.long, device="meta")
    # The mask has its last shape: transformers would read the values of any other one, and meta tensors have none.
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.zeros((1, 1, 4, 4), device="meta")}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs = {"input_ids": ids, "decoder_input_ids": ids}
    training, attention = model.training, model.config._attn_implementation
    try:
        if attention and "flash" in attention:  # its kernels need a GPU
            model.set_attn_implementation("eager")
        with torch.no_grad():
            model.train()(**inputs, use_cache=False)
    except Exception as error:  # any model's code runs here, on tensors without values
        return called, error
    finally:
        model.train(training)
        if attention and "flash" in attention:
            model.set_attn_implementation(attention)
        for handle in handles:
            handle.remove()
    return called, None
