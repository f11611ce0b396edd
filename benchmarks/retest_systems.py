"""The rows of `retest.py`: LoRA, its bounds, and Partial-LoRA's derivations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RANK, ALPHA = 8, 16.0
PUBLISHED = 0.135
"""Partial-LoRA's kept share of LoRA's values on SST-2 (Table 6: 0.18M of 1.33M)."""


@dataclass(frozen=True)
class System:
    """One row of the table.

    Attributes:
        factors: of LoRA's best rate; those of LoRA itself of `CENTRE`.
        adapter: settings that differ from rank 8 at scaling 2 on all linear layers.
        rate_of: a system of the same budget whose rate it takes, without a search of its own.
    """

    name: str
    method: Mapping[str, Any]
    factors: tuple[float, float, float] = (0.25, 1.0, 4.0)
    adapter: Mapping[str, Any] | None = None
    rate_of: System | None = None

    @property
    def folder(self) -> str:
        """Its part of the paths of its runs."""
        return "".join(c if c.isalnum() else "-" for c in self.name.lower()).strip("-")


def _partial(**settings: Any) -> dict[str, Any]:
    own = {"name": "partial_lora", "sample_fraction": 0.05, "micro_batch_size": 64, "masking": "compact"}
    return own | settings


MASKS = (1.0, 4.0, 16.0)
LORA = System("LoRA, r 8", {"name": "lora"})
BALANCED = System("Partial-LoRA, balanced .135", _partial(ratios="balanced", ratio=PUBLISHED), MASKS)
JOINT = System("Partial-LoRA, joint (ours)", _partial(derivation="joint", mask_scaling=True), MASKS)
SINGLE = System("Partial-LoRA, single", _partial(derivation="single"), MASKS)
# Both derivations at the published share: where one keeps more than elsewhere, with the rest at a lower bound.
JOINT_AT = System("Partial-LoRA, joint at .135", _partial(derivation="joint", ratio=PUBLISHED), rate_of=BALANCED)
SINGLE_AT = System(
    "Partial-LoRA, single with min_ratio .12", _partial(derivation="single", min_ratio=0.12), rate_of=BALANCED
)
RANK_ONE = System("LoRA, r 1", {"name": "lora"}, adapter={"r": 1, "lora_alpha": ALPHA / RANK})
TARGETED = System(
    "Targeted-LoRA, balanced .135", _partial(ratios="balanced", ratio=PUBLISHED, selection="targeted"), MASKS
)
LAST_LAYER = r".*encoder\.layer\.5\.output\.dense"
SYSTEMS = (
    LORA,
    BALANCED,
    JOINT_AT,
    SINGLE_AT,
    # An adapter whose output is scaled by 1e-30 changes nothing in float32, so that the head learns alone. It sits in
    # the last layer, because a backward pass stops there.
    System("Head alone", {"name": "lora"}, adapter={"r": 1, "lora_alpha": 1e-30, "target_modules": LAST_LAYER}),
    SINGLE,
    JOINT,
    RANK_ONE,
    TARGETED,
    System("Full fine-tuning", {"name": "full"}, (1 / 64, 1 / 16, 1 / 4)),
)
"""In the order in which they run, so that a part of the table is useful: first what decides the default derivation."""

BESIDE = (
    ("The joint derivation's masks beside the single one's", JOINT_AT, SINGLE_AT),
    ("LoRA of rank 1 beside the balanced masks", RANK_ONE, BALANCED),
    ("Targeted masks beside random ones, both balanced", TARGETED, BALANCED),
)
"""Systems with about the same number of values, to be compared with each other."""
