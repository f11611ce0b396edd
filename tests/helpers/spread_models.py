"""Fixtures: tiny models with logits that differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


@pytest.fixture
def causal(model_folder: Path) -> nn.Module:
    return _spread(AutoModelForCausalLM.from_pretrained(model_folder))


@pytest.fixture
def encoder(encoder_folder: Path) -> nn.Module:
    """With a head of three labels."""
    return _spread(AutoModelForSequenceClassification.from_pretrained(encoder_folder, num_labels=3))


def _spread(model: nn.Module) -> nn.Module:
    """Large weights: logits that differ enough for an error to show."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.4, generator=generator)
    return model.eval().requires_grad_(False)
