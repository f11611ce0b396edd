"""A plan's adapters on a base model, whosever tuner carries them; and the files that stock PEFT loads again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from sparse_llm_ft.adapters.config import SparseLoraConfig
from sparse_llm_ft.adapters.convert import to_stock_lora
from sparse_llm_ft.adapters.masking import clear_masked, to_whole
from sparse_llm_ft.model.architecture import task_type
from sparse_llm_ft.plan import AdapterPlan

VERA_PROJECTION_SEED = 0
"""VeRA's frozen projections are drawn from it; it is saved instead of them."""


def add_adapters(model: nn.Module, plan: AdapterPlan, **options: Any) -> PeftModel:
    """`get_peft_model` with the plan's tuner; the modules that the plan trains whole require gradients.

    Args:
        options: passed on to `get_peft_model`.
    """
    config: PeftConfig = SparseLoraConfig(plan=plan) if plan.tuner == "sparse_lora" else peft_config(plan)
    # For classification PEFT would copy the head, which is trained in place here.
    config.task_type = None if plan.trained else task_type(model)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    peft_model = get_peft_model(model, config, **options)
    assert isinstance(peft_model, PeftModel)
    if plan.tuner == "vera":
        _cast_vera(model, dtype)
    if plan.tuner == "adalora":
        _freeze_ranks(model)
    for name in plan.trained:
        model.get_submodule(name).requires_grad_(True)
    clear_masked(peft_model, plan)
    return peft_model


def change_plan(model: PeftModel, before: AdapterPlan, plan: AdapterPlan) -> PeftModel:
    """The model with `plan` in place of `before`, around the same base; all adapters are built anew."""
    if before.tuner == plan.tuner == "sparse_lora":
        model.base_model.set_plan(plan, fresh=True)
        clear_masked(model, plan)
        return model
    base: Any = model.unload()
    base.requires_grad_(False)
    return add_adapters(base, plan)


def peft_config(plan: AdapterPlan) -> PeftConfig:
    """The configuration of PEFT's own tuner for a plan that names one."""
    active = plan.active
    (r, alpha), _ = Counter((a.r, a.lora_alpha) for a in active.values()).most_common(1)[0]
    common: dict[str, Any] = {"target_modules": sorted(active)}
    if plan.tuner == "vera":
        return VeraConfig(
            r=r,
            vera_dropout=plan.lora_dropout,
            projection_prng_key=VERA_PROJECTION_SEED,
            save_projection=False,
            **common,
        )
    common |= {"lora_alpha": alpha, "lora_dropout": plan.lora_dropout}
    if plan.tuner == "adalora":
        schedule = {key: _number(value) for key, value in plan.options.items()}
        return AdaLoraConfig(init_r=r, **schedule, **common)
    return LoraConfig(
        r=r,
        rank_pattern={name: a.r for name, a in active.items() if a.r != r},
        alpha_pattern={name: a.lora_alpha for name, a in active.items() if a.lora_alpha != alpha},
        use_dora=plan.tuner == "dora",
        **common,
    )


def save_peft_adapter(
    folder: Path,
    plan: AdapterPlan,
    tensors: Mapping[str, torch.Tensor],
    base_model: str,
    revision: str | None,
    task: str | None = "CAUSAL_LM",
) -> None:
    """Write trained adapters as ``adapter_config.json`` and ``adapter_model.safetensors`` for `PeftModel`.

    Plans of this package's tuner and of PEFT's LoRA become a LoRA (`to_stock_lora`), the others what they are.

    Args:
        task: PEFT's name of what the model does, see `task_type`.
    """
    if plan.tuner in ("sparse_lora", "lora"):
        config, weights = to_stock_lora(plan, tensors, task)
    else:
        config, weights = peft_config(plan).to_dict(), {}
        config |= {"inference_mode": True, "task_type": task, "target_modules": sorted(plan.active)}
        for name, tensor in to_whole(plan, tensors).items():
            matrix = plan.tuner == "dora" and name.endswith((".lora_A", ".lora_B"))
            weights[f"base_model.model.{name}" + (".weight" if matrix else "")] = tensor.contiguous()
        if plan.trained:
            config["modules_to_save"] = list(plan.trained)
    config |= {"base_model_name_or_path": base_model, "revision": revision}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")


def _cast_vera(model: nn.Module, dtype: torch.dtype) -> None:
    """Scaling vectors and frozen projections in the base's precision.

    PEFT makes both float32 and lets the vectors decide what it computes in; DeepSpeed casts parameters, and so the
    vectors, but not buffers, and so not the projections. The vectors' float32 masters are DeepSpeed's.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if ".vera_" in name:
            tensor.data = tensor.data.to(dtype)


def _freeze_ranks(model: nn.Module) -> None:
    """AdaLoRA divides by a constant that PEFT keeps as a parameter, and that on a half-precision base comes to require
    gradients where PEFT widens it (peft 0.21.2): it would be trained, and saved under a name that no plan has.
    """
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value
