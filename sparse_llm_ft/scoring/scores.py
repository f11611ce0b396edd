"""The scores of a phase."""

from __future__ import annotations

from typing import TypeAlias

from sparse_llm_ft.scoring.derivation import Derivation

OutputScores: TypeAlias = dict[str, float]
"""Module -> g, the mean squared norm of its adapter's output (LoRA-drop)."""


Scores: TypeAlias = OutputScores | Derivation | None
"""What a phase's end was scored with, if anything."""
