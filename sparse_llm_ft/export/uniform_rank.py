"""Converts a LoRA to one rank and one scaling, for servers without ``rank_pattern`` and ``alpha_pattern``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from sparse_llm_ft.adapters import tuner_of
from sparse_llm_ft.plan import AdapterPlan

A, B = ".lora_A.weight", ".lora_B.weight"


def to_uniform_rank(
    config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], plan: AdapterPlan
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Give every module the largest rank R and scaling 1; no ΔW changes.

    A (r, d_in) gets rows of zeros, B (d_out, r) columns of zeros; the scaling is multiplied into B.

    Args:
        config: ``adapter_config.json`` of the plan's stock LoRA.
        weights: its tensors.

    Returns:
        The config with ``r == lora_alpha == R`` and empty patterns, and the tensors of rank R.
    """
    tuner, active = tuner_of(plan), plan.active
    rank = max(tensor.shape[0] for name, tensor in weights.items() if name.endswith(A))
    padded = {}
    for name, tensor in weights.items():
        module = name.removeprefix("base_model.model.").removesuffix(A).removesuffix(B)
        if name.endswith(A):
            tensor = F.pad(tensor, (0, 0, 0, rank - tensor.shape[0]))
        elif name.endswith(B):
            tensor = F.pad(tensor * tuner.scaling(active[module]), (0, rank - tensor.shape[1]))
        padded[name] = tensor.contiguous()
    plain = {key: value for key, value in config.items() if key not in tuner.lora_options}
    return {**plain, "r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}, padded
