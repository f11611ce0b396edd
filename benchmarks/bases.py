"""Llamas of random weights: SmolLM2-135M and Llama-3-8B in their real shapes, and small ones."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

_KEPT_WHOLE = "lm_head"


def llama_3_8b() -> LlamaConfig:
    """Its shapes."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        max_position_embeddings=8192,
    )


def smollm2_135m() -> LlamaConfig:
    """Its shapes; the head shares the embeddings' weight."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def tiny_llama(layers: int = 4) -> LlamaConfig:
    """A narrow one. No side of its tensors is 8, the rank by which `compare_profile` knows adapters."""
    return LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )


def random_base(
    config: LlamaConfig, quantization: str, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> LlamaForCausalLM:
    """The frozen base in `dtype`, or with its layers' weights in nf4; the same each time."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.requires_grad_(False)
    model.config.use_cache = False
    if quantization == "nf4":
        _quantize(model, device, dtype)
    return model


def _quantize(model: LlamaForCausalLM, device: torch.device, dtype: torch.dtype) -> None:
    """Put 4-bit layers in place, as transformers does it while it loads a checkpoint."""
    import bitsandbytes as bnb

    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != _KEPT_WHOLE]
    for name, module in linear:
        layer = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=dtype,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=dtype,
            device="meta",
        )
        layer.weight = bnb.nn.Params4bit(
            module.weight.data.cpu() if device.type == "cpu" else module.weight.data,
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=dtype,
            module=layer,
        ).to(device)
        layer.support_avx512bf16_for_cpu = False
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # by which PEFT chooses its layers
