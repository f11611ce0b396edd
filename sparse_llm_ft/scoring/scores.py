"""The scores of a phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from sparse_llm_ft.scoring.derivation import Derivation

OutputScores: TypeAlias = dict[str, float]
"""Module -> g, the mean squared norm of its adapter's output (LoRA-drop)."""


@dataclass(frozen=True)
class EntryScores:
    """``|∂L/∂θ ⊙ θ|`` of every entry of the adapters' matrices (SNIP; He et al., 2022).

    Attributes:
        values: short parameter name -> scores of the parameter's shape.
        samples: how many samples the loss is summed over.
    """

    values: Mapping[str, torch.Tensor]
    samples: int


Scores: TypeAlias = OutputScores | EntryScores | Derivation | None
"""What a phase's end was scored with, if anything."""
