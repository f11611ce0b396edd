"""Sparse Adapter, as in LoRA-drop's comparison: a targeted SNIP mask on LoRA with a fixed sparsity."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StrictInt

from sparse_llm_ft.config.types import Float
from sparse_llm_ft.methods.method import MethodInputs
from sparse_llm_ft.methods.partial_lora import MaskSettings, PartialLora, PartialLoraSettings


class SparseAdapterSettings(MaskSettings):
    """The sparsity, and the samples for SNIP's gradients.

    Attributes:
        sparsity: masked share of rows and of columns.
        shots: samples per class for the gradients.
    """

    sparsity: Annotated[Float, Field(ge=0, lt=1)] = 0.5
    shots: StrictInt = Field(16, ge=1)

    @property
    def draws_samples(self) -> bool:
        """True, because gradients are taken on `shots` samples per class."""
        return True

    def as_partial(self) -> PartialLoraSettings:
        """The equivalent settings of Partial-LoRA."""
        return PartialLoraSettings(
            **{key: getattr(self, key) for key in MaskSettings.model_fields},
            shots=self.shots,
            importance="snip",
            selection="targeted",
            ratios="balanced",
            ratio=1 - self.sparsity,
            masking="compact",
        )


class SparseAdapter(PartialLora):
    """Partial-LoRA with these settings."""

    settings_class = SparseAdapterSettings

    def __init__(self, settings: SparseAdapterSettings, inputs: MethodInputs) -> None:
        super().__init__(settings.as_partial(), inputs)
