"""Settings of the methods: one class each, told apart by `name`. The rules themselves are in sparse_llm_ft.methods."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from sparse_llm_ft.config.numbers import Float
from sparse_llm_ft.errors import ConfigError


class _Method(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def check(self, total_steps: int | None) -> None:
        """Refuse what contradicts itself or, once it is known, the run's length (in optimizer steps).

        Raises:
            ConfigError: naming the setting.
        """


class LoraMethod(_Method):
    """LoRA on every target module for the whole run."""

    name: Literal["lora"]


class WeightLoraMethod(_Method):
    """WeightLoRA (Veprikov et al., section 3.3).

    Attributes:
        keep: K, how many adapters stay.
        steps: T, optimizer steps with trained omega, after which the others are disconnected.
        cut_every: optimizer steps between two cuts (the paper cuts after each).
        cut_after: optimizer steps before the first cut. Once cut, an adapter hardly ever comes back, so this
            warm-up decides what the choice is made from.
        omega_lr, omega_optimizer: step rule of omega; its learning rate does not follow `training.schedule`.
        choose: ``omega`` keeps the largest; ``random`` is the paper's ablation RLoRA.
        batch_growth: what the freed memory is used for. ``keep_global``: larger micro-batch, fewer accumulation
            steps, the same updates. ``grow_global``: larger micro-batch and global batch.
        lr_scaling: how the learning rate follows a grown global batch.
    """

    name: Literal["weight_lora"]
    keep: StrictInt = Field(ge=1)
    steps: StrictInt = Field(ge=1)
    cut_every: StrictInt = Field(1, ge=1)
    cut_after: StrictInt = Field(0, ge=0)
    omega_lr: Float = Field(0.1, gt=0)
    omega_optimizer: Literal["sgd", "adamw"] = "sgd"
    choose: Literal["omega", "random"] = "omega"
    batch_growth: Literal["none", "keep_global", "grow_global"] = "keep_global"
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"

    def check(self, total_steps: int | None) -> None:
        """A cut must come before T, and T before the run's end."""
        if self.cut_after >= self.steps:
            raise ConfigError(
                "method.cut_after",
                f"{self.cut_after} leaves no cut before step {self.steps}",
                "expected less than method.steps",
            )
        if self.lr_scaling != "none" and self.batch_growth != "grow_global":
            raise ConfigError(
                "method.lr_scaling",
                f"{self.lr_scaling!r} has no effect under batch_growth {self.batch_growth}",
                "expected none, or batch_growth: grow_global",
            )
        if total_steps is not None and self.steps >= total_steps:
            raise ConfigError(
                "method.steps",
                f"{self.steps} is not before the run's end at step {total_steps}",
                f"expected 1 to {total_steps - 1}, or more training.max_steps or epochs",
            )


class WeightLoraPlusMethod(WeightLoraMethod):
    """WeightLoRA+ (section 3.4): the survivors' ranks grow into the warm-up's parameter budget.

    Attributes:
        expansion: ``gaussian`` adds random rows to A and zero columns to B; ``qr`` orthonormalises A first.
    """

    name: Literal["weight_lora_plus"]  # type: ignore[assignment]
    expansion: Literal["qr", "gaussian"] = "qr"


MethodConfig = LoraMethod | WeightLoraMethod | WeightLoraPlusMethod
