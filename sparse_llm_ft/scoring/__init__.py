"""What is measured before training: importances, sparsity ratios, masks, and the size of adapters' outputs."""

from sparse_llm_ft.scoring.cache import content_key, hash_files, hash_samples, load, save
from sparse_llm_ft.scoring.contracts import ALONE, DerivationSettings, Split
from sparse_llm_ft.scoring.derivation import Derivation, derive, measure_only
from sparse_llm_ft.scoring.importance import Importance, overlap, preserve_flow, svd_importance
from sparse_llm_ft.scoring.lora_output import OutputScores, importance_by_type, select_layers
from sparse_llm_ft.scoring.masks import draw_masks
from sparse_llm_ft.scoring.ratios import balanced, pyramidal, ratios_from_file

__all__ = [
    "ALONE",
    "Derivation",
    "DerivationSettings",
    "Importance",
    "OutputScores",
    "Split",
    "balanced",
    "content_key",
    "derive",
    "draw_masks",
    "hash_files",
    "hash_samples",
    "importance_by_type",
    "load",
    "measure_only",
    "overlap",
    "preserve_flow",
    "pyramidal",
    "ratios_from_file",
    "save",
    "select_layers",
    "svd_importance",
]
