"""Builds the base with a phase's fresh adapters. At stage 3 the base is sharded while it is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import nn

from sparse_llm_ft.adapters import add_adapters, change_plan, is_adapter, trained_parameters
from sparse_llm_ft.adapters.masking import to_compact
from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.data.tasks.mode import TaskMode
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.engine.settings import EngineSettings
from sparse_llm_ft.engine.sharded_loading import gathered_copy, load_sharded_model
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.io.wait import Wait
from sparse_llm_ft.model.buffers import persistent_buffers
from sparse_llm_ft.model.layers import compile_layers, keep_all_layers
from sparse_llm_ft.model.loading import load_model
from sparse_llm_ft.model.staging import keep_name, stage_base
from sparse_llm_ft.model.tied import refuse_untied
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan


def build_model(
    config: RunConfig,
    task_mode: TaskMode,
    plan: AdapterPlan,
    deepspeed_settings: Mapping[str, object],
    world: World,
    console: Console,
) -> PeftModel:
    """Collective. Load the base, from the node's copy under ``model.stage_to``, and put the plan's adapters on it, the
    same on every rank.

    Args:
        deepspeed_settings: of the engine that will be built around the model.

    Raises:
        UserError: the base cannot be copied or loaded, or has not the tied weights that the plan trains.
    """
    model = stage_base(config.model, world, console)
    with Wait(console, "loading", unit="bytes") as wait:
        if config.deepspeed.zero_stage == 3:
            base = load_sharded_model(model, deepspeed_settings, task_mode, config.seed, wait=wait)
        else:
            base = load_model(model, task_mode, config.seed, wait)
    if keep_all_layers(base):
        console.log("LayerDrop is off: every process must run the same layers, whose gradients are summed")
    refuse_untied(base, plan.trained, config.model.name)
    keep_name(base, config.model)
    torch.manual_seed(config.seed)
    return _compiled(config, add_adapters(base, plan))


def rebuild_model(config: RunConfig, model: PeftModel, before: AdapterPlan, plan: AdapterPlan) -> PeftModel:
    """Replace the adapters of `before` by fresh ones of `plan`, around the same base."""
    torch.manual_seed(config.seed)
    return _compiled(config, change_plan(model, before, plan))


def _compiled(config: RunConfig, model: PeftModel) -> PeftModel:
    """The model, whose layers torch will compile if the settings say so.

    Raises:
        ConfigError: it has no stack of layers.
    """
    if config.training.compile == "layers" and not compile_layers(model):
        raise ConfigError("training.compile", "layers, but this model has no list of equal layers", "expected off")
    return model


def fresh_heads(model: PeftModel, plan: AdapterPlan) -> dict[str, torch.Tensor]:
    """Collective. The fully trained modules beside the adapters as they were loaded: name -> float32, on the CPU."""
    if FULL_MODEL in plan.trained:
        return {}
    heads = {name: gathered_copy(p) for name, p in trained_parameters(model).items() if not is_adapter(name)}
    return to_compact(plan, heads)


def untrained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Collective. What belongs to the weights of a model that is trained whole, and is not trained: buffers, and
    parameters that its class fixes. Copies on the CPU.
    """
    fixed = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return persistent_buffers(model) | {name: gathered_copy(p).to(p.dtype) for name, p in fixed.items()}


def engine_settings(config: RunConfig, phase: Phase, world_size: int) -> EngineSettings:
    """The settings of the phase's engine; the phase's batch sizes must be set.

    A phase with a learning rate of its own has it for the head too: then it fits the head alone.
    """
    training = config.training
    head_rate = None if phase.learning_rate is not None else training.head_learning_rate
    return EngineSettings(
        zero_stage=config.deepspeed.zero_stage,
        dtype=config.model.dtype,
        micro_batch_size=phase.micro_batch_size,
        accumulation_steps=phase.global_batch_size // (phase.micro_batch_size * world_size),
        max_grad_norm=training.max_grad_norm,
        weight_decay=training.weight_decay,
        omega_lr=phase.omega_lr,
        omega_algorithm=phase.omega_algorithm,
        extra=config.deepspeed.extra,
        lora_b_lr_factor=phase.lora_b_lr_factor,
        head_lr_factor=1.0 if head_rate is None else head_rate / training.learning_rate,
    )
