"""Full fine-tuning of every parameter: no adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from sparse_llm_ft.config.method_settings import MethodSettings
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.methods.method import Method
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan, Shape

if TYPE_CHECKING:
    from sparse_llm_ft.checkpoint.state import TrainState
    from sparse_llm_ft.config import RunConfig


class FullSettings(MethodSettings):
    """Full fine-tuning has no settings of its own."""

    why_alone = "has no adapters"

    def check_run(self, config: RunConfig) -> None:
        """Refuse a 4-bit base, which cannot be trained."""
        if config.model.quantization != "none":
            raise ConfigError(
                "method.name", f"full cannot train a base in {config.model.quantization}", "expected quantization: none"
            )


class Full(Method[FullSettings]):
    """One phase that trains the base itself."""

    settings_class = FullSettings

    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """A plan without adapters that trains the model itself."""
        return replace(phase, plan=AdapterPlan(dict.fromkeys(phase.plan.modules), trained=(FULL_MODEL,))), state
