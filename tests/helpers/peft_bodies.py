"""Tiny models of the kinds that PEFT tests its tuners on: own nets, decoders, encoder-decoders, encoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from helpers.tiny_models import IDS, MODELS


class Mlp(nn.Module):
    """Linear layers with and without bias, one of them inside a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(10, 10, bias=False), nn.Tanh())])
        self.last = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Reused(nn.Module):
    """One linear layer that is called three times in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(6, 6)
        self.last = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = self.step(x).tanh()
        return self.last(x)


class Transposed(nn.Module):
    """An embedding, GPT-2's Conv1D, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 6)
        self.conv = Conv1D(10, 6)
        self.last = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.conv(self.table(x)).relu())


class Convolved(nn.Module):
    """A convolution and a norm, which have no adapters, before linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3)
        self.norm = nn.LayerNorm(12)
        self.last = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.conv(x.unflatten(-1, (2, 3)).repeat(1, 1, 2)).flatten(1)))


@dataclass(frozen=True)
class Body:
    """A model, an input, and where its output is.

    Attributes:
        make: the model with random weights.
        inputs: keyword arguments of the model.
        output: the tensor to compare, of what the model returns.
        writes: whether it generates texts.
        targets: number of linear layers beside heads.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    output: Callable[[Any], torch.Tensor]
    targets: int
    writes: bool = False

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same weights every time, in evaluation mode."""
        torch.manual_seed(0)
        return self.make().to(dtype).eval()

    def given(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in self.inputs().items()}

    def __call__(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The model's output, without gradients."""
        with torch.no_grad():
            return self.output(model(**self.given(dtype)))


def _own(make: Callable[[], nn.Module], inputs: Callable[[], torch.Tensor], targets: int) -> Body:
    return Body(make, lambda: {"x": inputs()}, lambda out: out, targets)


def _numbers() -> torch.Tensor:
    return torch.linspace(-1, 1, 18).view(3, 6)


_T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
_BERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_SPECIAL = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}

BODIES = {
    "mlp": _own(Mlp, _numbers, 3),
    "reused": _own(Reused, _numbers, 2),
    "transposed": _own(Transposed, lambda: IDS, 2),
    "convolved": _own(Convolved, _numbers, 1),
    "llama": Body(MODELS["llama"].build, lambda: {"input_ids": IDS}, lambda out: out.logits, 14, writes=True),
    "gpt2": Body(MODELS["gpt2"].build, lambda: {"input_ids": IDS}, lambda out: out.logits, 8, writes=True),
    "t5": Body(
        lambda: T5ForConditionalGeneration(T5Config(**_T5, **_SPECIAL)),
        lambda: {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]},
        lambda out: out.logits,
        6 + 10,
        writes=True,
    ),
    "bart": Body(
        MODELS["bart"].build,
        lambda: {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]},
        lambda out: out.logits,
        32,
        writes=True,
    ),
    "bert features": Body(
        lambda: BertModel(BertConfig(vocab_size=64, **_BERT, initializer_range=0.3)),
        lambda: {"input_ids": IDS, "attention_mask": (IDS != 3).long()},
        lambda out: torch.cat([out.last_hidden_state, out.pooler_output[:, None]], dim=1),
        13,
    ),
}
