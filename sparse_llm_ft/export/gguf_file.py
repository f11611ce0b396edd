"""Writes a LoRA as GGUF for llama.cpp and Ollama, as llama.cpp's own converter does.

The reference is ggml-org/llama.cpp: convert_lora_to_gguf.py, conversion/llama.py and conversion/qwen.py. `make
test-servers` compares the two, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from sparse_llm_ft.errors import UserError
from sparse_llm_ft.serving.facts import PREFIX, A, B

GGUF_FILE = "adapter.gguf"

_ARCHITECTURES = {
    "LlamaForCausalLM": ("LLAMA", True),
    "MistralForCausalLM": ("LLAMA", True),
    "Qwen2ForCausalLM": ("QWEN2", False),
    "Qwen3ForCausalLM": ("QWEN3", False),
}
"""transformers' class -> member of `gguf.MODEL_ARCH`, and whether queries and keys are permuted."""


def check_gguf(model: PreTrainedModel, server: str) -> None:
    """Refuse before anything slow what cannot be written as GGUF.

    Raises:
        UserError: the package gguf is missing, or the base's architecture is not one of those that were compared with
            the converter.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(
            f"--for {server}: the package gguf is not installed; install it by pip install 'sparse-llm-ft[gguf]'"
        ) from None
    name = type(model).__name__
    if name not in _ARCHITECTURES:
        raise UserError(
            f"--for {server}: no GGUF for adapters of {name}; expected {', '.join(_ARCHITECTURES)}, or --to merged"
        )


def write_gguf(path: Path, model: PreTrainedModel, alpha: float, weights: Mapping[str, torch.Tensor]) -> None:
    """Write A and B of every module under llama.cpp's names, in float32.

    llama.cpp multiplies B A by alpha / rank. It stores the rows of a Llama's queries and keys in another order, in
    which rotary positions pair neighbours, so the rows of their B are permuted too.

    Args:
        model: the base; its class and config are used, see `check_gguf`.
        alpha: lora_alpha of the uniform LoRA.
        weights: its tensors by PEFT's names; A (r, d_in) and B (d_out, r).
    """
    import gguf

    config = model.config
    member, permuted = _ARCHITECTURES[type(model).__name__]
    arch = gguf.MODEL_ARCH[member]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    for key, a in weights.items():
        if not key.endswith(A):
            continue
        module = key.removeprefix(PREFIX).removesuffix(A)
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None:
            raise UserError(f"{module}: llama.cpp has no such tensor in {gguf.MODEL_ARCH_NAMES[arch]}")
        b = weights[f"{PREFIX}{module}{B}"]
        if permuted:
            b = _permuted(b, module, config)
        for part, tensor in (("lora_a", a), ("lora_b", b)):
            writer.add_tensor(f"{name}.{part}", tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _permuted(b: torch.Tensor, module: str, config: PreTrainedConfig) -> torch.Tensor:
    """B (d_out, r) with the rows of a query or key as llama.cpp stores them (`LlamaModel.permute`): each head's halves,
    which transformers rotates together, are interleaved.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module.rpartition(".")[2])
    return b if heads is None else b.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(b.shape)


def modelfile(base: str) -> str:
    """Ollama's recipe for the base with the adapter beside it.

    Args:
        base: the base's name or folder.
    """
    comment = "# The base: a folder, a GGUF file, or the name of the same model in Ollama."
    return f"{comment}\nFROM {base}\nADAPTER ./{GGUF_FILE}\n"
