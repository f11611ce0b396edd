"""In which form a base is stored and held: plain, 4 bit by bitsandbytes, or in a form that cannot be trained here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig

from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.errors import ConfigError, reason_of


def resolve_quantization(config: ModelConfig, settings: PreTrainedConfig) -> ModelConfig:
    """The model's settings with the quantisation that will run: a base that is stored in 4 bit is held in its own form.

    Args:
        settings: the base's own config.

    Raises:
        ConfigError: the base is stored in another form than ``model.quantization`` asks for, or in one that can be
            neither trained nor merged.
    """
    stored = stored_quantization(settings)
    if stored is None:
        return config
    if stored.get("load_in_4bit"):
        kind = _stored_kind(stored, config.name)
        if config.quantization in ("none", kind):
            return config.model_copy(update={"quantization": kind})
        raise ConfigError(
            "model.quantization",
            f"{config.quantization}, but {config.name!r} is stored in {kind}",
            f"expected {kind}, or a base that is not quantised",
        )
    form = "8 bit by bitsandbytes" if stored.get("load_in_8bit") else str(stored.get("quant_method", "an unnamed form"))
    raise ConfigError(
        "model.name",
        f"{config.name!r} is stored in {form:.60}",
        "expected a base in 16 or 32 bit, or in nf4 or fp4 by bitsandbytes",
    )


def _stored_kind(stored: Mapping[str, Any], name: str) -> str:
    """``nf4`` or ``fp4``.

    Raises:
        ConfigError: the base's config says something else.
    """
    try:
        kind = str(BitsAndBytesConfig.from_dict(dict(stored)).bnb_4bit_quant_type)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            "model.name",
            f"{name!r} has a quantization_config that bitsandbytes does not take ({reason_of(error)})",
            "expected a config.json as bitsandbytes writes it",
        ) from error
    if kind not in ("nf4", "fp4"):
        raise ConfigError("model.name", f"{name!r} is stored in {kind:.60}", "expected nf4 or fp4")
    return kind


def check_codes(model: nn.Module, name: str) -> None:
    """Refuse a base whose config says that it is stored in 4 bit, and whose weights are plain.

    transformers loads the plain weights into 4-bit layers, which fail in the first forward pass.

    Args:
        name: ``model.name``, for messages.

    Raises:
        ConfigError: naming the first such layer.
    """
    for layer, module in model.named_modules():
        if isinstance(module, Linear4bit) and getattr(module.weight, "quant_state", None) is None:
            raise ConfigError(
                "model.name",
                f"{name!r} is stored in 4 bit, says its config.json, but {layer} is not",
                "expected a config.json without quantization_config, or weights in 4 bit",
            )


def stored_quantization(settings: PreTrainedConfig) -> Mapping[str, Any] | None:
    """What a base's config says of the form of its weights; None if they are plain."""
    for part in (settings, settings.get_text_config()):
        stored = getattr(part, "quantization_config", None)
        if stored is not None:
            return stored if isinstance(stored, Mapping) else dict(stored.to_dict())
    return None


def four_bit_options(
    kind: str, settings: PreTrainedConfig, dtype: torch.dtype, whole: Collection[str] | None
) -> dict[str, Any]:
    """transformers' options for a base in 4 bit, quantised when it is loaded or stored so.

    Args:
        kind: ``nf4`` or ``fp4``.
        settings: the base's own config, which is changed.
        dtype: type of the computation.
        whole: modules that stay in `dtype`; None: those that transformers chooses.
    """
    stored = stored_quantization(settings)
    if stored is None:
        new = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,
            llm_int8_skip_modules=None if whole is None else list(whole),
        )
        return {"quantization_config": new}
    # The weights stay as they are stored. What the run computes in is its own setting.
    changed = {**stored, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
    if whole is not None:
        changed["llm_int8_skip_modules"] = [*whole, *(stored.get("llm_int8_skip_modules") or ())]
    settings.quantization_config = changed
    return {"config": settings}
