"""Sparse Adapter as LoRA-drop's paper compares it: a targeted SNIP mask on LoRA at a fixed sparsity."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StrictInt

from sparse_llm_ft.config.types import Float
from sparse_llm_ft.methods.method import MethodInputs
from sparse_llm_ft.methods.partial_lora import MaskSettings, PartialLora, PartialLoraSettings


class SparseAdapterSettings(MaskSettings):
    """How much is masked, and what it is chosen from.

    Attributes:
        sparsity: share of rows, and of columns, that is masked.
        shots: samples per class that the gradients are taken from.
    """

    sparsity: Annotated[Float, Field(ge=0, lt=1)] = 0.5
    shots: StrictInt = Field(16, ge=1)

    @property
    def draws_samples(self) -> bool:
        """True: gradients are taken from `shots` samples of each class."""
        return True

    def as_partial(self) -> PartialLoraSettings:
        """The Partial-LoRA that it is."""
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
