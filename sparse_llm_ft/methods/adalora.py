"""AdaLoRA (Zhang et al., 2023) by PEFT: adapters start with rank `adapter.r`, and training prunes singular values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field, StrictInt

from sparse_llm_ft.config.method_settings import MethodSettings
from sparse_llm_ft.config.types import Float, Section
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.methods.method import Method, MethodInputs
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import AdapterPlan, Shape

if TYPE_CHECKING:
    from sparse_llm_ft.checkpoint.state import TrainState
    from sparse_llm_ft.config import RunConfig


class AdaLoraSchedule(Section):
    """AdaLoRA's pruning schedule, also for Partial-LoRA with masked AdaLoRA.

    Attributes:
        target_r: mean rank after pruning; less than `adapter.r`.
        tinit, tfinal: optimizer steps before pruning begins and after it has ended; None: a tenth and three tenths
            of the run.
        delta_t: optimizer steps between two prunings.
        orth_reg_weight: coefficient of the orthogonality penalty.
    """

    target_r: StrictInt = Field(4, ge=1)
    tinit: StrictInt | None = Field(None, ge=0)
    tfinal: StrictInt | None = Field(None, ge=0)
    delta_t: StrictInt = Field(1, ge=1)
    orth_reg_weight: Float = Field(0.5, ge=0)

    def steps(self, total_steps: int) -> tuple[int, int]:
        """(tinit, tfinal) of a run of `total_steps`."""
        tinit = total_steps // 10 if self.tinit is None else self.tinit
        tfinal = 3 * total_steps // 10 if self.tfinal is None else self.tfinal
        return tinit, tfinal

    def check(self, total_steps: int | None) -> None:
        """Refuse a tinit and tfinal without a step for pruning between them."""
        if total_steps is not None and sum(self.steps(total_steps)) >= total_steps:
            raise ConfigError(
                "method.tinit",
                f"tinit and tfinal take all {total_steps} steps of the run",
                "expected tinit + tfinal < steps",
            )

    def check_run(self, config: RunConfig) -> None:
        """Refuse a rank with nothing to prune, and ZeRO-3, which shards the matrices."""
        if self.target_r >= config.adapter.r:
            raise ConfigError(
                "method.target_r",
                f"{self.target_r} leaves nothing to prune from adapter.r {config.adapter.r}",
                f"expected less than {config.adapter.r}",
            )
        if config.deepspeed.zero_stage == 3:
            raise ConfigError(
                "deepspeed.zero_stage",
                "3, but adalora's orthogonality penalty needs full matrices",
                "expected 0 to 2",
            )


class AdaLoraSettings(AdaLoraSchedule, MethodSettings):
    """AdaLoRA on every target module."""

    why_alone = "trains PEFT's own layers, which have no masks, groups or omega; use partial_lora with base: adalora"


def adalora_plan(plan: AdapterPlan, schedule: AdaLoraSchedule, inputs: MethodInputs) -> AdapterPlan:
    """The plan with AdaLoRA's layers. Every adapter starts with rank r, even if its matrix is smaller; masks stay."""
    tinit, tfinal = schedule.steps(inputs.total_steps)
    options = {
        "target_r": schedule.target_r,
        "tinit": tinit,
        "tfinal": tfinal,
        "deltaT": schedule.delta_t,
        "total_step": inputs.total_steps,
        "orth_reg_weight": schedule.orth_reg_weight,
    }
    modules = {name: a and replace(a, r=inputs.r, lora_alpha=inputs.lora_alpha) for name, a in plan.modules.items()}
    return replace(plan, modules=modules, tuner="adalora", options=options)


class AdaLora(Method[AdaLoraSettings]):
    """PEFT's own AdaLoRA."""

    settings_class = AdaLoraSettings

    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """The incoming plan's modules, with AdaLoRA's layers."""
        return replace(phase, plan=adalora_plan(phase.plan, self.settings, self.inputs)), state
