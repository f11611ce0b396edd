"""Tiny random models of eight architectures, and the names of their linear layers, written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sparse_llm_ft.adapters import SparseLoraConfig
from sparse_llm_ft.adapters.convert import short_name

IDS = torch.tensor([[2, 17, 5, 40, 8, 3], [2, 9, 33, 33, 1, 3]])
ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
GATED_MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
LLAMA_MODULES = ATTENTION + GATED_MLP
NEOX_MODULES = ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
GPT2_MODULES = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
BERT_REST = ["attention.output.dense", "intermediate.dense", "output.dense"]
BART_ATTENTION = ["k_proj", "v_proj", "q_proj", "out_proj"]


def _layers(prefix: str, modules: list[str], layers: int = 2) -> set[str]:
    return {f"{prefix}.{i}.{module}" for i in range(layers) for module in modules}


@dataclass(frozen=True)
class Tiny:
    """A model class with its sizes. `build` gives the same weights every time."""

    kind: type[PreTrainedModel]
    config: Callable[[], object]
    targets: frozenset[str]
    task_type: str | None = None

    def build(self) -> PreTrainedModel:
        return _spread(self.kind(self.config()))


def _spread(model: nn.Module) -> nn.Module:
    """Random weights and biases large enough for every layer to show in the logits; in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):
            parameter.data.normal_(std=0.1, generator=generator)
    return model.eval()


_DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_GROUPED = _DECODER | {"num_key_value_heads": 2}
_ENCODER = _DECODER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
_BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "dropout": 0.0,
}

MODELS = {
    "llama": Tiny(
        LlamaForCausalLM,
        lambda: LlamaConfig(**_GROUPED),
        frozenset(_layers("model.layers", LLAMA_MODULES)),
        "CAUSAL_LM",
    ),
    "mistral": Tiny(
        MistralForCausalLM,
        lambda: MistralConfig(**_GROUPED),
        frozenset(_layers("model.layers", LLAMA_MODULES)),
    ),
    "qwen2": Tiny(
        Qwen2ForCausalLM,
        lambda: Qwen2Config(**_GROUPED),
        frozenset(_layers("model.layers", LLAMA_MODULES)),
        "CAUSAL_LM",
    ),
    "gpt_neox": Tiny(
        GPTNeoXForCausalLM,
        lambda: GPTNeoXConfig(**_DECODER),
        frozenset(_layers("gpt_neox.layers", NEOX_MODULES)),
    ),
    "gpt2": Tiny(  # its layers store their weights transposed
        GPT2LMHeadModel,
        lambda: GPT2Config(
            vocab_size=64, n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=32, **dict.fromkeys(_DROPOUTS, 0.0)
        ),
        frozenset(_layers("transformer.h", GPT2_MODULES)),
        "CAUSAL_LM",
    ),
    "bert": Tiny(
        BertForSequenceClassification,
        lambda: BertConfig(**_ENCODER),
        frozenset(
            _layers("bert.encoder.layer", [f"attention.self.{n}" for n in ("query", "key", "value")] + BERT_REST)
            | {"bert.pooler.dense"}
        ),
        "SEQ_CLS",
    ),
    "deberta_v2": Tiny(
        DebertaV2ForSequenceClassification,
        lambda: DebertaV2Config(
            **_ENCODER, pooler_hidden_size=32, relative_attention=True, pos_att_type=["c2p", "p2c"], pooler_dropout=0.0
        ),
        frozenset(
            _layers(
                "deberta.encoder.layer",
                [f"attention.self.{n}" for n in ("query_proj", "key_proj", "value_proj", "pos_key_proj")]
                + ["attention.self.pos_query_proj"]
                + BERT_REST,
            )
            | {"pooler.dense"}
        ),
    ),
    "bart": Tiny(
        BartForConditionalGeneration,
        lambda: BartConfig(**_BART),
        frozenset(
            _layers("model.encoder.layers", [f"self_attn.{n}" for n in BART_ATTENTION] + ["fc1", "fc2"])
            | _layers(
                "model.decoder.layers",
                [f"{a}.{n}" for a in ("self_attn", "encoder_attn") for n in BART_ATTENTION] + ["fc1", "fc2"],
            )
        ),
        "SEQ_2_SEQ_LM",
    ),
}


def llama(layers: int = 2, hidden_size: int = 32) -> LlamaForCausalLM:
    """A Llama with the same weights every time."""
    sizes = _GROUPED | {"num_hidden_layers": layers, "hidden_size": hidden_size, "intermediate_size": hidden_size * 3}
    return _spread(LlamaForCausalLM(LlamaConfig(**sizes)))


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The model's logits in evaluation mode; the mode is put back."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        result = model(input_ids=ids).logits
    model.train(was_training)
    return result


def with_adapters(model: nn.Module, **settings):
    """The model under `SparseLoraConfig(**settings)`, every B (zero so far) random: adapters that change something."""
    wrapped = get_peft_model(model, SparseLoraConfig(**{"lora_alpha": 4.0} | settings))
    randomize(wrapped)
    return wrapped


def randomize(model: nn.Module, seed: int = 1, adapter_name: str = "default") -> None:
    """Random values, far from zero, in every B of the adapter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter_name}." in name:
            parameter.data.normal_(std=0.2, generator=generator)


def adapters_of(model: nn.Module, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    """An adapter's parameters under their short names, whether they are trained at the moment or not."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name and f".{adapter_name}" in name:
            found[short_name(name, adapter_name)] = parameter
    return found
