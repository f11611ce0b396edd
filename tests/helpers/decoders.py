"""Tiny decoders of several families, on CPUs, and the loss that transformers itself gives a sample alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from sparse_llm_ft.data.collate import IGNORE_INDEX
from sparse_llm_ft.data.samples import Sample
from sparse_llm_ft.objectives.language_modeling import CompletionObjective

SAMPLES = (
    Sample((5, 6, 7, 8), (9, 10, 2)),
    Sample((11, 12), (13, 14, 15, 2)),
    Sample((21,), (22, 2)),
    Sample((5, 9, 11, 30, 31, 3, 17), (9, 2)),
)
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
FALCON = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "eos_token_id": 2}

DECODERS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=4),  # shorter than its longest sample, too
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "gpt2": lambda: GPT2Config(**GPT2, pad_token_id=0),
}
OTHERS: dict[str, Callable[[], PreTrainedConfig]] = {
    "falcon": lambda: FalconConfig(**FALCON),
    "gemma3": lambda: Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi": lambda: PhiConfig(**SIZES),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    "mixtral": lambda: MixtralConfig(**GROUPED, num_local_experts=4),
}


def build(settings: PreTrainedConfig, attention: str = "sdpa") -> PreTrainedModel:
    """Large weights: logits that differ enough for an error to show."""
    model = AutoModelForCausalLM.from_config(settings, attn_implementation=attention)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3, generator=generator)
    return model.eval()


def objective_of(model: PreTrainedModel) -> CompletionObjective:
    return CompletionObjective(0, "logits_to_keep" in inspect.signature(model.forward).parameters)


def alone(model: PreTrainedModel, sample: Sample) -> torch.Tensor:
    """Transformers' own loss, summed."""
    ids = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])
    labels = ids.clone()
    labels[:, : len(sample.prompt_ids)] = IGNORE_INDEX
    return model(input_ids=ids, labels=labels).loss * sample.supervised


def check_gradients(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    """Those of a batch of `SAMPLES` are the sums of those of each sample alone."""
    objective_of(model).loss(model, batch).backward()
    found = {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    for sample in SAMPLES:
        alone(model, sample).backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max()) + 1.0
            torch.testing.assert_close(found[key], parameter.grad, rtol=1e-4, atol=1e-5 * scale, msg=key)
