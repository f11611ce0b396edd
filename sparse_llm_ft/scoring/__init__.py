"""Scores that methods plan from: importances, sparsity ratios, masks, and the size of adapters' outputs."""

from sparse_llm_ft.config.derivation import DerivationSettings
from sparse_llm_ft.scoring.contracts import ALONE, WorkShard
from sparse_llm_ft.scoring.derivation import Derivation, derive, measure_only
from sparse_llm_ft.scoring.importance import Importance, overlap, preserve_flow, svd_importance
from sparse_llm_ft.scoring.lora_output import OutputScores, importance_by_type, select_layers
from sparse_llm_ft.scoring.masks import draw_masks
from sparse_llm_ft.scoring.ratios import balanced, pyramidal, ratios_from_table, with_share

__all__ = [
    "ALONE",
    "Derivation",
    "DerivationSettings",
    "Importance",
    "OutputScores",
    "WorkShard",
    "balanced",
    "derive",
    "draw_masks",
    "importance_by_type",
    "measure_only",
    "overlap",
    "preserve_flow",
    "pyramidal",
    "ratios_from_table",
    "select_layers",
    "svd_importance",
    "with_share",
]
