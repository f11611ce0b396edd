"""LoRA (Hu et al., 2021): the same adapter on every target module, one phase."""

from __future__ import annotations

from collections.abc import Mapping

from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.methods.phase import Phase
from sparse_llm_ft.plan import Shape, uniform_plan
from sparse_llm_ft.state import TrainState


class Lora:
    """One phase with one plan."""

    def __init__(self, config: RunConfig) -> None:
        self.adapter = config.adapter

    def first(self, targets: Mapping[str, Shape]) -> Phase:
        """Every target module with rank r."""
        adapter = self.adapter
        return Phase("train", uniform_plan(targets, adapter.r, adapter.lora_alpha, adapter.lora_dropout))

    def next(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState] | None:
        """Nothing follows."""
        return None
