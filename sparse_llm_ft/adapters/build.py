"""Puts a plan's adapters on a base model with any tuner, and writes the files that stock PEFT loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from sparse_llm_ft.adapters.convert import is_adapter, saved_modules, to_stock_lora
from sparse_llm_ft.adapters.masking import clear_masked, to_full
from sparse_llm_ft.adapters.model import train_whole
from sparse_llm_ft.adapters.tuners import tuner_of
from sparse_llm_ft.model.architecture import has_head, task_type
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
    config.task_type = None if plan.trained and has_head(model) else task_type(model)
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = any_transposed(model, plan.active)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    peft_model = get_peft_model(model, config, **options)
    assert isinstance(peft_model, PeftModel)
    if isinstance(model, PreTrainedModel):  # as in `enable_checkpointing`; PEFT makes them require gradients again
        model.disable_input_require_grads()  # type: ignore[no-untyped-call]
    tuner.prepare(model, dtype)
    train_whole(model, plan)
    clear_masked(peft_model, plan)
    return peft_model


@dataclass(frozen=True)
class BaseOptions:
    """What PEFT must know of the base to load a plan's adapter.

    Attributes:
        settings: further settings of the adapter.
        repeated: parameter of the base -> the trained one whose value it shares, and which PEFT stores a second time.
    """

    settings: dict[str, object] = field(default_factory=dict)
    repeated: dict[str, str] = field(default_factory=dict)


_NONE = BaseOptions()


def base_options(model: PreTrainedModel, plan: AdapterPlan) -> BaseOptions:
    """The options for weights that are stored transposed, and for a head that shares the weight of embeddings which
    are trained whole.
    """
    settings: dict[str, object] = {"fan_in_fan_out": True} if any_transposed(model, plan.active) else {}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    name = names.get(id(embeddings))
    if name not in plan.trained or name in plan.rows or head is None or head.weight is not embeddings.weight:
        return BaseOptions(settings)
    return BaseOptions(settings | {"ensure_weight_tying": True}, {f"{names[id(head)]}.weight": f"{name}.weight"})


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
    options: BaseOptions = _NONE,
) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """Write trained adapters as ``adapter_config.json`` and ``adapter_model.safetensors`` for `PeftModel`.

    Returns:
        What was written, see `peft_adapter`.
    """
    config, weights = peft_adapter(plan, tensors, base_model, revision, task, options)
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
    options: BaseOptions = _NONE,
    patterns: bool = False,
) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """PEFT's settings and tensors of trained adapters.

    If ΔW is a scaled product of A and B, the adapter becomes a LoRA (`to_stock_lora`); else it keeps its tuner.

    Args:
        tensors: short parameter name -> value; all but omegas may lie on the meta device.
        task: PEFT's task type, see `task_type`.
        options: what follows from the base, see `base_options`.
        patterns: see `to_stock_lora`; has no effect on an adapter that keeps its tuner.
    """
    tuner = tuner_of(plan)
    config: dict[str, object]
    if tuner.is_product:
        config, weights = to_stock_lora(plan, tensors, task, patterns)
    else:
        config = tuner.peft_config(plan).to_dict()
        config |= {"inference_mode": True, "task_type": task, "target_modules": sorted(plan.active)}
        adapters = {name: t for name, t in to_full(plan, tensors).items() if is_adapter(name)}
        weights = {tuner.saved_name(name): t.contiguous() for name, t in adapters.items()}
        settings, whole = saved_modules(plan, tensors)
        config, weights = config | settings, weights | whole
    copies = {copy: tensors[name].clone() for copy, name in options.repeated.items() if name in tensors}
    weights |= {f"base_model.model.{copy}": tensor for copy, tensor in copies.items()}
    return config | options.settings | {"base_model_name_or_path": base_model, "revision": revision}, weights
