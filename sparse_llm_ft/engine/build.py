"""The base with a phase's fresh adapters; at stage 3 the base is already cut into shards when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel

from sparse_llm_ft.adapters import add_adapters, change_plan, is_adapter, trained_parameters
from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.engine.engine import EngineSettings
from sparse_llm_ft.engine.sharded_loading import gathered_copy, load_sharded_model
from sparse_llm_ft.model.loading import load_model
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan


def build_model(
    config: RunConfig, task_mode: TaskMode, plan: AdapterPlan, deepspeed_settings: Mapping[str, Any]
) -> PeftModel:
    """Load the base and put the plan's adapters on it, the same on every rank. Collective.

    Args:
        deepspeed_settings: of the engine that will be built around the model.
    """
    if config.deepspeed.zero_stage == 3:
        base = load_sharded_model(config.model, deepspeed_settings, task_mode, config.seed)
    else:
        base = load_model(config.model, task_mode, config.seed)
    torch.manual_seed(config.seed)
    return add_adapters(base, plan)


def rebuild_model(config: RunConfig, model: PeftModel, before: AdapterPlan, plan: AdapterPlan) -> PeftModel:
    """The model with fresh adapters of `plan` in place of those of `before`, around the same base."""
    torch.manual_seed(config.seed)
    return change_plan(model, before, plan)


def fresh_heads(model: PeftModel, plan: AdapterPlan) -> dict[str, torch.Tensor]:
    """What the plan trains whole beside the adapters, as it was loaded: name -> float32, on the CPU. Collective."""
    if FULL_MODEL in plan.trained:
        return {}
    return {name: gathered_copy(p) for name, p in trained_parameters(model).items() if not is_adapter(name)}


def engine_settings(config: RunConfig, phase: Phase, world_size: int) -> EngineSettings:
    """What an engine for the phase, whose batch sizes are settled, is built with."""
    return EngineSettings(
        zero_stage=config.deepspeed.zero_stage,
        dtype=config.model.dtype,
        micro_batch_size=phase.micro_batch_size,
        accumulation_steps=phase.global_batch_size // (phase.micro_batch_size * world_size),
        max_grad_norm=config.training.max_grad_norm,
        weight_decay=config.training.weight_decay,
        omega_lr=phase.omega_lr,
        omega_algorithm=phase.omega_algorithm,
        extra=config.deepspeed.extra,
        lora_b_lr_factor=phase.lora_b_lr_factor,
    )
