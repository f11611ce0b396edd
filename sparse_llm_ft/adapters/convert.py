"""Names of adapter parameters, and conversion of trained adapters to a stock PEFT LoRA."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from sparse_llm_ft.adapters.layer import SparseLoraLayer
from sparse_llm_ft.plan import AdapterPlan

Tensors = Mapping[str, torch.Tensor]


def adapter_parameters(model: nn.Module, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    """The trainable adapter parameters in the model's order, under short names that outlive wrappers:
    ``<module>.lora_A`` (r, d_in), ``<module>.lora_B`` (d_out, r), ``<module>.lora_omega`` (1,).
    """
    named = {}
    for name, module in model.named_modules():
        if not isinstance(module, SparseLoraLayer) or adapter_name not in module.adapters:
            continue
        name = name.removeprefix("base_model.model.")
        named[f"{name}.lora_A"] = module.lora_A[adapter_name].weight
        named[f"{name}.lora_B"] = module.lora_B[adapter_name].weight
        if adapter_name in module.lora_omega:
            named[f"{name}.lora_omega"] = module.lora_omega[adapter_name]
    return named


def is_omega(name: str) -> bool:
    """Whether a short parameter name is that of an omega."""
    return name.endswith(".lora_omega")


def to_stock_lora(plan: AdapterPlan, tensors: Tensors) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """A LoRA that PEFT loads without this package: its ``adapter_config.json`` and its tensors.

    omega is folded into B. PEFT computes ``lora_alpha / r`` from one pair and per-module exceptions
    (``rank_pattern``, ``alpha_pattern``); the most frequent pair becomes the general one. A trained omega <= 0
    and a module without adapter are left out.

    Args:
        plan: the plan that was trained.
        tensors: short parameter name -> value, float32.
    """
    kept = {name: a for name, a in plan.active.items() if _omega(name, plan, tensors) > 0}
    if not kept:
        raise ValueError("no adapter is on: every omega is 0 or negative")
    (r, alpha), _ = Counter((a.r, a.lora_alpha) for a in kept.values()).most_common(1)[0]
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": plan.lora_dropout,
        "bias": "none",
        "target_modules": sorted(kept),
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
        "rank_pattern": {name: a.r for name, a in kept.items() if a.r != r},
        "alpha_pattern": {name: a.lora_alpha for name, a in kept.items() if a.lora_alpha != alpha},
    }
    weights = {}
    for name in kept:
        prefix = f"base_model.model.{name}"
        weights[f"{prefix}.lora_A.weight"] = tensors[f"{name}.lora_A"].contiguous()
        weights[f"{prefix}.lora_B.weight"] = tensors[f"{name}.lora_B"] * _omega(name, plan, tensors)
    return config, weights


def save_stock_lora(folder: Path, plan: AdapterPlan, tensors: Tensors, base_model: str, revision: str | None) -> None:
    """Write `to_stock_lora` as ``adapter_config.json`` and ``adapter_model.safetensors`` into `folder`."""
    config, weights = to_stock_lora(plan, tensors)
    config |= {"base_model_name_or_path": base_model, "revision": revision}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _omega(name: str, plan: AdapterPlan, tensors: Tensors) -> float:
    trained = tensors.get(f"{name}.lora_omega")
    return float(trained) if trained is not None else plan.active[name].omega
