"""Bytes that one rank hands to collectives in a step: of each call the larger of what goes in and what comes out.

An all-reduce of n bytes counts n; a ring moves 2 (ranks - 1) / ranks of that per rank.
"""

from __future__ import annotations

import math

from torch import nn

from sparse_llm_ft.adapters import is_adapter, is_omega, trained_parameters, tuner_of
from sparse_llm_ft.distributed import signals
from sparse_llm_ft.engine.gathers import Gathers
from sparse_llm_ft.engine.rank_bytes import Inventory, RankBytes, persists, zero_settings
from sparse_llm_ft.engine.settings import EngineSettings
from sparse_llm_ft.phase import Phase


def communicated_bytes(
    phase: Phase,
    model: nn.Module,
    settings: EngineSettings,
    held: RankBytes,
    inventory: Inventory,
    gathers: Gathers,
    ranks: int,
    accumulation: int,
) -> int:
    """Of a step of `phase` on each of `ranks` processes.

    Args:
        model: on the meta device, with the phase's adapters; `held`, `inventory` and `gathers` are its own.
        accumulation: micro-steps of a step.
    """
    if ranks == 1:
        return 0
    stage = settings.zero_stage
    # The loop sums four counts and, in one vector, the loss, a flag for memory, one for errors and one for each signal;
    # the engine the norm. At stage 3 DeepSpeed sums a norm of its own for each parameter group.
    groups = {settings.group_of(name) for name in trained_parameters(model)}
    agreed = 4 * 8 + 4 * (3 + len(signals.caught())) + (4 if stage else 0) + (8 * len(groups) if stage == 3 else 0)
    read = _read_by_callback(phase, model) if stage else 0  # without ZeRO every rank has all of it
    return agreed + read + _exchanged(settings, held, inventory, gathers, ranks, accumulation)


def _read_by_callback(phase: Phase, model: nn.Module) -> int:
    """What a callback reads after each update, as float32: every omega, or for AdaLoRA values and gradients."""
    trained = {name: math.prod(p.shape) for name, p in trained_parameters(model).items()}
    if phase.cut is not None:
        return 4 * sum(size for name, size in trained.items() if is_omega(name))
    if tuner_of(phase.plan).allocates_ranks:
        return 4 * (sum(trained.values()) + sum(size for name, size in trained.items() if is_adapter(name)))
    return 0


def _exchanged(
    settings: EngineSettings, held: RankBytes, inventory: Inventory, gathers: Gathers, ranks: int, accumulation: int
) -> int:
    """Gradients and weights."""
    stage, size = settings.zero_stage, 2 if settings.dtype == "bfloat16" else 4
    weights = inventory.weights.values()
    trained = [weight for weight in weights if weight.trained]
    if held.flat:
        return 2 * held.adapters  # gradients once a step, and the updated weights
    if stage < 3:
        reduced = sum(weight.numel for weight in trained) * size * (accumulation if stage == 2 else 1)
        return reduced + (held.adapters if stage else 0)
    padded = sum(weight.part(ranks) * ranks for weight in trained) * size
    config = zero_settings(settings, 1)
    # Every update gathers anew what stays gathered, frozen weights too.
    kept = sum(w.part(ranks) * ranks * w.itemsize for w in weights if persists(w, config))
    return accumulation * (padded + gathers.traffic) + kept
