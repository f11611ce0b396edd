"""Rules on plain tensors, without model: settings, chains, states."""

from __future__ import annotations

from typing import Any

import torch

from sparse_llm_ft.checkpoint.state import Progress, TrainState
from sparse_llm_ft.config import RunConfig, parse_config
from sparse_llm_ft.methods.chain import Chain, build_methods
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import Shape, uniform_plan
from sparse_llm_ft.scoring import Derivation, DerivationSettings, Importance

TARGETS: dict[str, Shape] = {
    f"layers.{layer}.{kind}": shape
    for layer in range(4)
    for kind, shape in (("attn.q", (8, 8)), ("attn.k", (4, 8)), ("mlp.up", (12, 8)))
}
"""Grouped-query shapes: k has fewer rows than q."""


def config(method: Any, **sections: Any) -> RunConfig:
    tree = {
        "model": {"name": "org/base"},
        "task": {"name": "custom"},
        "output_dir": "x",
        "adapter": {"r": 2, "lora_alpha": 6},
        "method": method,
    }
    return parse_config(tree | sections)


def start(method: Any, trained: tuple[str, ...] = (), **sections: Any) -> tuple[Chain, Phase]:
    """The chain and the phase it begins with."""
    chain = build_methods(config(method, **sections), total_steps=20)
    return chain, chain.first(uniform_plan(TARGETS, 2, 6.0, 0.0, trained), TARGETS)


def state(phase: Phase, head: bool = False) -> TrainState:
    """Random values and moments of all that the phase's plan trains."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for owner, name in phase.plan.matrix_owners().items():
        adapter = phase.plan.active[name]
        rows, columns = adapter.shape(TARGETS[name])
        tensors[f"{owner}.lora_A"] = torch.randn(adapter.r, columns, generator=generator)
        tensors[f"{owner}.lora_B"] = torch.randn(rows, adapter.r, generator=generator)
    for name, adapter in phase.plan.active.items():
        if adapter.train_omega:
            tensors[f"{name}.lora_omega"] = torch.rand(1, generator=generator) + 0.1
        if adapter.train_vectors:
            tensors[f"{name}.lora_u"] = torch.rand(adapter.r, generator=generator) + 0.5
            tensors[f"{name}.lora_v"] = torch.rand(adapter.shape(TARGETS[name])[0], generator=generator) + 0.5
    if head:
        tensors["classifier.weight"] = torch.randn(2, 8, generator=generator)
    moments = {
        name: {key: torch.rand(t.shape, generator=generator) for key in ("exp_avg", "exp_avg_sq")}
        for name, t in tensors.items()
        if not name.endswith("omega")
    }
    return TrainState(tensors, moments, {"adapter": 5, "whole": 5}, Progress(5, 80, 0, 5), phase.to_dict())


def derivation(ratio: tuple[float, float] = (0.5, 0.25)) -> Derivation:
    """A derivation in which later indices matter more."""
    importance = {
        name: Importance(torch.arange(1.0, rows + 1), torch.arange(1.0, columns + 1))
        for name, (rows, columns) in TARGETS.items()
    }
    ratios = dict.fromkeys(TARGETS, ratio)
    return Derivation(DerivationSettings(), 0.9, 0.01, 0.5, 0.3, 32, 32, ratios, importance)
