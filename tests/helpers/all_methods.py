"""Every method, with its variants and compositions, in settings for a run of 8 steps on the tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WEIGHT = {"name": "weight_lora", "keep": 4, "steps": 4, "cut_after": 2, "omega_lr": 0.5}
PARTIAL = {"name": "partial_lora", "derivation": "single", "floor_metric": "loss", "shots": 6}
JOINT = {"name": "partial_lora", "floor_metric": "loss", "shots": 6, "ratio": 0.4}  # the default derivation
DROP = {"name": "lora_drop", "sample_fraction": 0.3, "pilot_epochs": 1, "threshold": 0.6}
METHODS: dict[str, Any] = {
    "lora": "lora",
    "lora_plus": "lora_plus",
    "rslora": "rslora",
    "dora": "dora",
    "vera": {"name": "vera", "r": 16},
    "adalora": {"name": "adalora", "target_r": 2},
    "full": "full",
    "tied_lora": "tied_lora",
    "sparse_adapter": {"name": "sparse_adapter", "shots": 6, "warmup_steps": 3},
    "sparse_rows_columns": {"name": "sparse_adapter", "rule": "rows_columns"},
    "random_masking": {"name": "random_masking", "ratio": 0.3},
    "partial": PARTIAL,
    "partial_imp": PARTIAL | {"importance": "imp", "selection": "stochastic", "compare_importance": True},
    "partial_compact": JOINT | {"masking": "compact"},
    "partial_joint": PARTIAL | {"derivation": "joint", "ratio": 0.4, "mask_scaling": True, "min_ratio": 0.2},
    "partial_dora": PARTIAL | {"base": "dora"},
    "partial_adalora": PARTIAL | {"base": "adalora", "adalora": {"target_r": 2}},
    "pyramidal": {"name": "partial_lora", "ratios": "pyramidal", "ratio": 0.7},
    "lora_drop": DROP,
    "lora_drop_removed": DROP | {"share": False},
    "weight_lora": WEIGHT,
    "weight_lora_one": WEIGHT | {"keep": 1, "steps": 2, "cut_after": 0},
    "weight_lora_all": WEIGHT | {"keep": 14, "batch_growth": "none"},
    "weight_lora_cost": WEIGHT | {"choose": "cost", "budget": 0.7},
    "weight_lora_plus": WEIGHT | {"name": "weight_lora_plus"},
    "weight_then_partial": [WEIGHT, JOINT],
    "partial_then_weight_plus": [PARTIAL, WEIGHT | {"name": "weight_lora_plus"}],
    "drop_then_partial": [DROP, JOINT],
    "tied_then_partial": ["tied_lora", PARTIAL],
}


def with_cache(method: Any, folder: Path) -> Any:
    """The method, with its derivations kept in `folder`."""
    if isinstance(method, list):
        return [with_cache(part, folder) for part in method]
    partial = isinstance(method, dict) and method["name"] == "partial_lora"
    return method | {"cache_dir": str(folder)} if partial else method
