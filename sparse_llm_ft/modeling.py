"""The pretrained base: tokenizer, an empty copy to plan on, and the weights, in 4 bit where asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one without a padding token pads with its end-of-sequence token.

    Raises:
        ConfigError: it cannot be loaded, or has no end-of-sequence token.
    """
    tokenizer = _from_pretrained(AutoTokenizer, config)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "model.name",
            f"{config.name!r} has a tokenizer without end-of-sequence token",
            "expected a model for text generation",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def empty_model(config: ModelConfig, attn_implementation: str | None = None) -> PreTrainedModel:
    """The architecture on the meta device: names and shapes, no weights, in about a second.

    Args:
        attn_implementation: where the model has the choice; None takes the model's default.

    Raises:
        ConfigError: no such model, or one that is not a causal language model.
    """
    settings = _from_pretrained(AutoConfig, config)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings, **options)
    except (ValueError, ImportError) as error:
        if attn_implementation is not None:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                "model.attn_implementation",
                f"{attn_implementation!r} cannot be used ({reason})",
                "expected sdpa or eager",
            ) from None
        raise ConfigError(
            "model.name",
            f"{config.name!r} is a {settings.model_type} model",
            "expected one that transformers can load as a causal language model",
        ) from None
    if settings.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not model.config.is_decoder:
        raise ConfigError(
            "model.name",
            f"{config.name!r} is an encoder ({settings.model_type}): it would see the completion it has to predict",
            "expected a causal language model",
        )
    return model


def check_weights(config: ModelConfig) -> None:
    """Refuse a local model folder without weights before anything is written.

    Raises:
        ConfigError: naming the folder.
    """
    folder = Path(config.name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise ConfigError("model.name", f"{config.name!r} has no weights", "expected model.safetensors there")


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The frozen base with its weights, on this process's device.

    Raises:
        ConfigError: weights that cannot be loaded.
    """
    options: dict[str, Any] = {"dtype": DTYPES[config.dtype]}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if config.quantization != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[config.dtype],
            bnb_4bit_quant_storage=DTYPES[config.dtype],
        )
    if config.quantization != "none" or torch.cuda.is_available():
        options["device_map"] = {"": device()}  # read straight onto the device, not through every rank's host memory
    model: PreTrainedModel = _from_pretrained(AutoModelForCausalLM, config, **options)
    model.requires_grad_(False)
    _keep_four_bit_weights_in_place(model)
    if config.gradient_checkpointing:
        # Non-reentrant: the reentrant kind would need inputs that require gradients, and with them the backward
        # pass would run down to the embeddings even where only upper layers have adapters.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    return model


def device() -> torch.device:
    """This process's accelerator, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _keep_four_bit_weights_in_place(model: nn.Module) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks a 4-bit weight inside forward; under ZeRO-3 the next gather
    brings the unpacked bytes back while the quantisation state says "packed", and the layer computes garbage.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _from_pretrained(kind: Any, config: ModelConfig, **options: Any) -> Any:
    """Load without running code from the repository; a failure to find or read it is the user's to mend."""
    try:
        return kind.from_pretrained(config.name, revision=config.revision, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            "model.name",
            f"{config.name!r} cannot be loaded ({reason})",
            "expected a hub id or a folder in Hugging Face layout",
        ) from error
