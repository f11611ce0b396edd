"""Tiny random models, samples that they get mostly right, and the objective that says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

CLASSES = 4
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 32}
HEADS = {"num_attention_heads": 4}


def spread(model: nn.Module, seed: int = 0, std: float = 0.4) -> nn.Module:
    """Weights and biases large enough for every layer to show in the logits; frozen, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.dim() > 1 or name.endswith("bias"):
            parameter.normal_(std=std, generator=generator)
    return model.eval()


def llama(layers: int = 3) -> nn.Module:
    """Grouped-query attention: k and v have half as many rows as q."""
    return spread(
        LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, num_hidden_layers=layers, num_key_value_heads=2, head_dim=4))
    )


def bert() -> nn.Module:
    return spread(BertForSequenceClassification(BertConfig(**SIZES, **HEADS, num_hidden_layers=3, num_labels=CLASSES)))


def deberta() -> nn.Module:
    """With the convolution that DeBERTa-v2 puts between its first two layers, outside of them."""
    config = DebertaV2Config(
        **SIZES,
        **HEADS,
        num_hidden_layers=3,
        num_labels=CLASSES,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        share_att_key=False,
        conv_kernel_size=3,
        conv_act="gelu",
        pooler_hidden_size=16,
    )
    return spread(DebertaV2ForSequenceClassification(config))


def bart() -> nn.Module:
    config = BartConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        num_labels=CLASSES,
        eos_token_id=2,
    )
    return spread(BartForSequenceClassification(config))


def linears(model: nn.Module, *endings: str) -> dict[str, nn.Module]:
    """The linear layers but heads; with `endings`, those whose names end so."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] not in ("lm_head", "classifier", "classification_head")
    }
    return {name: module for name, module in found.items() if not endings or name.endswith(endings)}


@dataclass(frozen=True)
class Row:
    ids: tuple[int, ...]
    label: int


class RowObjective:
    """Classification by the first logits at the last position (a language model) or by the head (an encoder)."""

    def batch(self, samples: Sequence[Row]) -> dict[str, torch.Tensor]:
        return {
            "input_ids": torch.tensor([row.ids for row in samples]),
            "labels": torch.tensor([row.label for row in samples]),
        }

    def logits(self, forward: Callable, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        output = forward(input_ids=batch["input_ids"])
        logits = output if isinstance(output, torch.Tensor) else output.logits
        return logits[:, -1, :CLASSES] if logits.dim() == 3 else logits

    def loss(self, forward: Callable, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.losses(forward, batch).sum()

    def losses(self, forward: Callable, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(self.logits(forward, batch), batch["labels"], reduction="none")

    def correct(self, forward: Callable, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (self.logits(forward, batch).argmax(-1) == batch["labels"]).long()

    def units(self, sample: Row) -> int:
        return 1

    def scored(self, sample: Row) -> int:
        return 1

    def majority(self, samples: Sequence[Row]) -> float:
        return max(Counter(row.label for row in samples).values()) / len(samples)


def rows_for(model: nn.Module, count: int = 24, length: int = 6, wrong: int = 2, seed: int = 1) -> list[Row]:
    """Random tokens, labelled as the model would; the first `wrong` are labelled otherwise."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (count * 40, length), generator=generator)
    ids[:, -1] = 2
    with torch.no_grad():
        labels = RowObjective().logits(model, {"input_ids": ids}).argmax(-1).tolist()
    # As even a share of the classes as there is: the majority must lie well below the accuracy.
    by_class = {
        c: [Row(tuple(i), c) for i, label in zip(ids.tolist(), labels, strict=True) if label == c] for c in set(labels)
    }
    chosen: list[Row] = []
    while len(chosen) < count:
        chosen += [rows.pop() for rows in by_class.values() if rows]
    chosen = chosen[:count]
    return [Row(r.ids, (r.label + 1) % CLASSES) if i < wrong else r for i, r in enumerate(chosen)]
