"""Tied-LoRA (Renduchintala et al., 2023; arXiv 2311.09578): W x + (lora_alpha / r) Λ_v B Λ_u A x.

The layers of one module type share A and B; every layer has its own vectors u (r) and v (d_out). All four are trained:
LoRA-drop's comparison (section 4.1) makes "the frozen LoRA in VeRA trainable".
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
    """One phase in which every module belongs to a group and trains its own u and v.

    u and v start at 1, A and B as LoRA's, so ΔW begins at 0 and the first step is that of a shared LoRA.
    """

    settings_class = TiedLoraSettings

    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """A plan in which every module belongs to the group of its type and shape."""
        modules: dict[str, ModuleAdapter | None] = {
            name: replace(adapter, group=group_name(module_kind(name), targets[name]), train_vectors=True)
            for name, adapter in phase.plan.active.items()
        }
        return replace(phase, plan=replace(phase.plan, modules=modules)), state
