"""Sparse Adapter (He et al., 2022; arXiv 2210.04284), LoRA-drop's baseline: SNIP prunes LoRA at a fixed sparsity.

rule: entries        prunes single entries of A and B, the ones with the least |∂L/∂θ ⊙ θ| of all (He et al.; Lee et
                     al., 2019). At LoRA's start this is 0 everywhere: B = 0, so θ is 0 in B and the gradient is 0 in A.
                     So a short warmup precedes it, which is ours.
                     phase "warmup":  LoRA, `warmup_steps` on D_t; then the scores, on D_t
                     phase "train":   fresh adapters; pruned entries are 0 and stay so
rule: rows_columns   ours: keeps the rows of B and columns of A with the largest |∂L/∂W| of the frozen weight. It needs
                     no warmup, and compact layers make it faster
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, StrictInt

from sparse_llm_ft.config.types import Float
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.methods.method import MethodInputs
from sparse_llm_ft.methods.partial_lora import MaskSettings, PartialLora, PartialLoraSettings
from sparse_llm_ft.phase import Phase, ScoringSpec, Subset
from sparse_llm_ft.plan import Shape

if TYPE_CHECKING:
    from sparse_llm_ft.checkpoint.state import TrainState
    from sparse_llm_ft.scoring.scores import Scores


class SparseAdapterSettings(MaskSettings):
    """The sparsity, and the samples for gradients.

    Attributes:
        rule: what is pruned: single ``entries`` as in the paper, or ``rows_columns``, ours.
        sparsity: pruned share of all entries; or of rows and of columns.
        shots: samples per class for the gradients; None: as `PartialLoraSettings`.
        warmup_steps: optimizer steps of LoRA before entries are scored. They do not count towards the run's length.
    """

    rule: Literal["entries", "rows_columns"] = "entries"
    sparsity: Annotated[Float, Field(ge=0, lt=1)] = 0.5
    shots: StrictInt | None = Field(None, ge=1)
    warmup_steps: StrictInt = Field(20, ge=1)

    @property
    def draws_samples(self) -> bool:
        """True, because gradients are taken on a part of the samples."""
        return True

    @property
    def alone(self) -> str | None:
        """Masks of single entries compose with nothing."""
        return "with rule: entries masks single entries" if self.rule == "entries" else None

    def check(self, total_steps: int | None) -> None:
        """Refuse settings of the other rule."""
        other = ("head_epochs", "head_learning_rate") if self.rule == "entries" else ("warmup_steps",)
        for key in other:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ConfigError(f"method.{key}", f"has no effect under rule {self.rule}", "expected to leave it out")

    def as_partial(self) -> PartialLoraSettings:
        """The settings of Partial-LoRA that are equivalent to ``rows_columns``."""
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
    """He et al.'s rule, or Partial-LoRA with equivalent settings."""

    settings_class = SparseAdapterSettings

    def __init__(self, settings: SparseAdapterSettings, inputs: MethodInputs) -> None:
        super().__init__(settings.as_partial(), inputs)
        self.own = settings

    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """The warmup, or what Partial-LoRA begins with."""
        if self.own.rule == "rows_columns":
            return super().begin(phase, state, targets)
        warmup = replace(
            phase,
            name="warmup",
            steps=self.own.warmup_steps,
            subset=Subset(None, self.own.shots, self.inputs.seed),
            is_warmup=True,
            scoring=ScoringSpec("entries"),
        )
        return warmup, state

    def next(
        self, phase: Phase, state: TrainState, scores: Scores, targets: Mapping[str, Shape]
    ) -> tuple[Phase, TrainState] | None:
        """Fresh adapters with the best entries; or as Partial-LoRA."""
        from sparse_llm_ft.methods.masking import largest_entries
        from sparse_llm_ft.scoring.scores import EntryScores

        if not isinstance(scores, EntryScores):
            return super().next(phase, state, scores, targets)
        plan = largest_entries(phase.plan, scores.values, 1 - self.own.sparsity)
        return replace(self._after(phase), plan=plan), state.fresh()

    def foresee(self, phase: Phase, targets: Mapping[str, Shape]) -> tuple[Phase, str] | None:
        """As many entries as `sparsity` leaves, drawn at random."""
        from sparse_llm_ft.methods.masking import random_entries

        if self.own.rule == "rows_columns" or phase.scoring is None:
            return super().foresee(phase, targets)
        share = 1 - self.own.sparsity
        plan = random_entries(phase.plan, targets, share, self.inputs.seed)
        return replace(self._after(phase), plan=plan), f"{share:g} of all entries stay (method.sparsity)"
