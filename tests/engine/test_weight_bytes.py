"""Bytes of weights on a rank, which summary.json has."""

from __future__ import annotations

import torch
from torch import nn

from sparse_llm_ft.engine.zero import weight_bytes


def test_a_sharded_weight_counts_as_its_part_gathered_or_not() -> None:
    """Small weights stay gathered at ZeRO-3 after a first pass; a resumed run has not made one."""
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 2, bias=False))
    model[0].weight.requires_grad_(False)
    assert weight_bytes(model) == (4 * 24, 4 * 8)
    for layer in model:
        layer.weight.ds_tensor = torch.zeros(layer.weight.numel() // 2)
    gathered = weight_bytes(model)
    for layer in model:
        layer.weight.data = torch.empty(0)
    assert gathered == weight_bytes(model) == (4 * 12, 4 * 4)
