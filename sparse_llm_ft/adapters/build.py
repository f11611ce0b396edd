"""Puts a plan's adapters on a base model with any tuner, and writes the files that stock PEFT loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from sparse_llm_ft.adapters.convert import to_stock_lora
from sparse_llm_ft.adapters.masking import clear_masked, to_full
from sparse_llm_ft.adapters.tuners import tuner_of
from sparse_llm_ft.model.architecture import task_type
from sparse_llm_ft.model.buffers import fixed_parameters
from sparse_llm_ft.model.linear import any_transposed
from sparse_llm_ft.plan import AdapterPlan

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's names of an adapter's files."""


def add_adapters(model: nn.Module, plan: AdapterPlan, **options: object) -> PeftModel:
    """`get_peft_model` with the plan's tuner; fully trained modules require gradients.

    Args:
        options: further arguments of `get_peft_model`.
    """
    tuner = tuner_of(plan)
    config = tuner.peft_config(plan)
    # PEFT would copy the head for classification; here it is trained in place.
    config.task_type = None if plan.trained else task_type(model)
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = any_transposed(model, plan.active)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    peft_model = get_peft_model(model, config, **options)
    assert isinstance(peft_model, PeftModel)
    tuner.prepare(model, dtype)
    fixed = fixed_parameters(model)
    for module in plan.trained:
        for name, parameter in model.get_submodule(module).named_parameters(prefix=module):
            parameter.requires_grad_(name not in fixed)
    clear_masked(peft_model, plan)
    return peft_model


def change_plan(model: PeftModel, before: AdapterPlan, plan: AdapterPlan) -> PeftModel:
    """Replace the adapters of `before` by fresh ones of `plan`, around the same base."""
    if tuner_of(before).own_layers and tuner_of(plan).own_layers:
        model.base_model.set_plan(plan, fresh=True)
        clear_masked(model, plan)
        return model
    base = model.unload()
    base.requires_grad_(False)
    return add_adapters(base, plan)


def save_peft_adapter(
    folder: Path,
    plan: AdapterPlan,
    tensors: Mapping[str, torch.Tensor],
    base_model: str,
    revision: str | None,
    task: str | None = "CAUSAL_LM",
    transposed: bool = False,
) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """Write trained adapters as ``adapter_config.json`` and ``adapter_model.safetensors`` for `PeftModel`.

    Returns:
        What was written, see `peft_adapter`.
    """
    config, weights = peft_adapter(plan, tensors, base_model, revision, task, transposed)
    write_peft_adapter(folder, config, weights)
    return config, weights


def write_peft_adapter(folder: Path, config: Mapping[str, object], weights: Mapping[str, torch.Tensor]) -> None:
    """Write an adapter's two files."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")


def peft_adapter(
    plan: AdapterPlan,
    tensors: Mapping[str, torch.Tensor],
    base_model: str,
    revision: str | None,
    task: str | None = "CAUSAL_LM",
    transposed: bool = False,
) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """PEFT's settings and tensors of trained adapters.

    If ΔW is a scaled product of A and B, the adapter becomes a LoRA (`to_stock_lora`); else it keeps its tuner.

    Args:
        tensors: short parameter name -> value; all but omegas may lie on the meta device.
        task: PEFT's task type, see `task_type`.
        transposed: whether the base's layers store their weights transposed, see `any_transposed`.
    """
    tuner = tuner_of(plan)
    config: dict[str, object]
    if tuner.is_product:
        config, weights = to_stock_lora(plan, tensors, task)
    else:
        config = tuner.peft_config(plan).to_dict()
        config |= {"inference_mode": True, "task_type": task, "target_modules": sorted(plan.active)}
        weights = {tuner.saved_name(name): t.contiguous() for name, t in to_full(plan, tensors).items()}
        if plan.trained:
            config["modules_to_save"] = list(plan.trained)
    if transposed:
        config["fan_in_fan_out"] = True
    return config | {"base_model_name_or_path": base_model, "revision": revision}, weights
