"""Random masking of single entries, as Xu & Zhang (2024) and Partial-LoRA's Table 1 ("Masking"), on LoRA's A and B.

Xu & Zhang train single entries of the base's own weights. Here these stay frozen, quantised and sharded as for every
other method, and the entries are the adapters': at the same share, it differs from Partial-LoRA by the masks' form
alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from sparse_llm_ft.config.method_settings import MethodSettings
from sparse_llm_ft.config.types import Share
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.methods.method import Method
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import Shape

if TYPE_CHECKING:
    from sparse_llm_ft.checkpoint.state import TrainState


class RandomMaskingSettings(MethodSettings):
    """The share of trained entries.

    Attributes:
        ratio: probability of an entry of A or B to be trained; all others are 0.
    """

    why_alone = "masks single entries, which no other method follows"

    ratio: Share

    @classmethod
    def example(cls, adapters: int, total_steps: int) -> dict[str, object]:
        """A tenth of the entries."""
        return {"ratio": 0.1}


class RandomMasking(Method[RandomMaskingSettings]):
    """One phase that trains randomly drawn entries of every A and B."""

    settings_class = RandomMaskingSettings

    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """The plan with masks of entries.

        Raises:
            ConfigError: no entry was drawn.
        """
        from sparse_llm_ft.methods.masking import random_entries

        ratio = self.settings.ratio
        plan = random_entries(phase.plan, targets, ratio, self.inputs.seed)
        if not any(a.entries and (a.entries.a.kept or a.entries.b.kept) for a in plan.active.values()):
            count = sum(a.matrices(targets[name]) for name, a in phase.plan.active.items())
            raise ConfigError("method.ratio", f"{ratio:g} keeps none of {count:,} entries", "expected a larger share")
        return replace(phase, plan=plan), state
