"""The tuner's PEFT configuration: an `AdapterPlan`, or the settings of a uniform one."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from peft.config import PeftConfig

from sparse_llm_ft.plan import AdapterPlan


class SparsePeftType(str, Enum):  # noqa: UP042 (as PEFT's own; StrEnum prints differently)
    """Our addition to PEFT's `PeftType`. PEFT reads `.value` and compares it as a string."""

    SPARSE_LORA = "SPARSE_LORA"


@dataclass
class SparseLoraConfig(PeftConfig):
    """Configuration of `SparseLoraModel`.

    Give either a `plan`, which then decides alone, or `r`, `lora_alpha`, `lora_dropout`, `train_omega` and
    `target_modules`: they become a uniform plan once the model is known.

    A rank above the smaller side of a module's matrix is cut to that side, with the same ``lora_alpha / r``.

    Attributes:
        plan: an `AdapterPlan`, or its `to_dict()`; saved in ``adapter_config.json``.
        target_modules: ``all-linear``, a list of name endings, or a regular expression.
        modules_to_save: modules that are fully trained and saved beside the adapters, as in PEFT.
    """

    plan: AdapterPlan | dict[str, Any] | None = None
    r: int = 8
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    train_omega: bool = False
    target_modules: str | list[str] | None = field(default="all-linear")
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SparsePeftType.SPARSE_LORA
        if isinstance(self.plan, dict):
            self.plan = AdapterPlan.from_dict(self.plan)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values, which PEFT saves."""
        plan = self.plan
        self.plan = None  # dataclasses.asdict would convert the plan field by field
        try:
            data: dict[str, Any] = super().to_dict()
        finally:
            self.plan = plan
        data["plan"] = plan.to_dict() if isinstance(plan, AdapterPlan) else plan
        return data
