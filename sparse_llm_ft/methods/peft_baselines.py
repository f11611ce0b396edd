"""Baselines: one tuner on every target module for the full run. LoRA and LoRA+ have this package's layers, or PEFT's on
request; rsLoRA, DoRA and VeRA have PEFT's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, TypeVar

from pydantic import Field, StrictInt

from sparse_llm_ft.config.method_settings import MethodSettings
from sparse_llm_ft.config.types import Float
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.methods.method import Method, S
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import MAX_RANK, AdapterPlan, Shape

if TYPE_CHECKING:
    from sparse_llm_ft.checkpoint.state import TrainState
    from sparse_llm_ft.config import RunConfig


class LoraSettings(MethodSettings):
    """LoRA (Hu et al., 2021).

    Attributes:
        tuner: whose layers train it. They compute the same; PEFT's keep more for backward and are slower
            (docs/benchmarks.md).
    """

    why_alone = "trains LoRA as it is"

    tuner: Literal["sparse_lora", "peft"] = "sparse_lora"


class LoraPlusSettings(LoraSettings):
    """LoRA+ (Hayou et al., 2024): LoRA with a larger learning rate for B.

    Attributes:
        lr_ratio: B's learning rate divided by A's.
    """

    lr_ratio: Float = Field(16.0, gt=0)


class RsLoraSettings(MethodSettings):
    """Rank-stabilised LoRA (Kalajdzievski, 2023; arXiv 2312.03732): B A is scaled by ``lora_alpha / sqrt(r)``."""

    why_alone = "trains PEFT's LoRA with a scaling of its own"


class DoraSettings(MethodSettings):
    """DoRA (Liu et al., 2024)."""

    why_alone = "trains PEFT's own layers, which have no masks, groups or omega"

    def check_run(self, config: RunConfig) -> None:
        """Refuse ZeRO-3, see `check_dora`."""
        check_dora(config)


class VeraSettings(MethodSettings):
    """VeRA (Kopiczko et al., 2024): frozen random projections, trained scaling vectors.

    Attributes:
        r: rank of the projections; far larger than LoRA's, since a module trains only r + d_out values.
    """

    why_alone = "trains PEFT's own layers, which have no masks, groups or omega"

    r: StrictInt = Field(256, ge=1, le=MAX_RANK)


def check_dora(config: RunConfig) -> None:
    """Refuse ZeRO-3, which leaves no rank with full weights of the base."""
    if config.deepspeed.zero_stage == 3:
        raise ConfigError(
            "deepspeed.zero_stage",
            "3, but PEFT's DoRA reads full weights of the base in every forward pass",
            "expected 0 to 2",
        )


class _PeftBaseline(Method[S], Generic[S]):
    tuner: ClassVar[str]

    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """The incoming plan's modules, with the tuner."""
        return replace(phase, plan=replace(self.resized(phase.plan), tuner=self.chosen_tuner())), state

    def chosen_tuner(self) -> str:
        """Its name in plans."""
        return self.tuner

    def resized(self, plan: AdapterPlan) -> AdapterPlan:
        """The plan with the tuner's own rank."""
        return plan


L = TypeVar("L", bound=LoraSettings)


class _Lora(_PeftBaseline[L]):
    def chosen_tuner(self) -> str:
        """This package's, or PEFT's."""
        return "lora" if self.settings.tuner == "peft" else "sparse_lora"


class Lora(_Lora[LoraSettings]):
    """LoRA."""

    settings_class = LoraSettings


class LoraPlus(_Lora[LoraPlusSettings]):
    """LoRA with two learning rates."""

    settings_class = LoraPlusSettings

    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """The incoming plan's modules, with LoRA and a larger learning rate for B."""
        return super().begin(replace(phase, lora_b_lr_factor=self.settings.lr_ratio), state, targets)


class RsLora(_PeftBaseline[RsLoraSettings]):
    """PEFT's own rank-stabilised LoRA."""

    settings_class = RsLoraSettings
    tuner = "rslora"

    def resized(self, plan: AdapterPlan) -> AdapterPlan:
        """The plan with the run's lora_alpha on every adapter, even if a small matrix reduced the rank."""
        alpha = self.inputs.lora_alpha
        return replace(plan, modules={n: a and replace(a, lora_alpha=alpha) for n, a in plan.modules.items()})


class Dora(_PeftBaseline[DoraSettings]):
    """PEFT's own DoRA."""

    settings_class = DoraSettings
    tuner = "dora"


class Vera(_PeftBaseline[VeraSettings]):
    """PEFT's own VeRA."""

    settings_class = VeraSettings
    tuner = "vera"

    def resized(self, plan: AdapterPlan) -> AdapterPlan:
        """The plan with VeRA's rank on every adapter."""
        return replace(plan, modules={name: a and replace(a, r=self.settings.r) for name, a in plan.modules.items()})
