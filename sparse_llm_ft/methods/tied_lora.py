"""Tied-LoRA (Renduchintala et al., 2023), as in LoRA-drop's comparison.

All layers share one pair of A and B per module type and shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from sparse_llm_ft.config.method_settings import MethodSettings
from sparse_llm_ft.methods.method import Method
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import ModuleAdapter, Shape, group_name, module_kind

if TYPE_CHECKING:
    from sparse_llm_ft.checkpoint.state import TrainState


class TiedLoraSettings(MethodSettings):
    """Tied-LoRA has no settings of its own."""

    composes = "shares"


class TiedLora(Method[TiedLoraSettings]):
    """One phase in which every module belongs to a group."""

    settings_class = TiedLoraSettings

    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """A plan in which every module belongs to the group of its type and shape."""
        modules: dict[str, ModuleAdapter | None] = {
            name: replace(adapter, group=group_name(module_kind(name), targets[name]))
            for name, adapter in phase.plan.active.items()
        }
        return replace(phase, plan=replace(phase.plan, modules=modules)), state
