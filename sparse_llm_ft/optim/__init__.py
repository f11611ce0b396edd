"""Optimizers that know adapters: AdamW on kept entries, also in ZeRO's partitions, and StoIHT on omega."""

from sparse_llm_ft.optim.adapter_optimizer import MOMENTS, AdapterOptimizer
from sparse_llm_ft.optim.iht import StoIHT, keep_largest
from sparse_llm_ft.optim.masks import EntryMask, Mask, PackedMask, RowColumnMask
from sparse_llm_ft.optim.sparse_adamw import SparseAdamW

__all__ = [
    "MOMENTS",
    "AdapterOptimizer",
    "EntryMask",
    "Mask",
    "PackedMask",
    "RowColumnMask",
    "SparseAdamW",
    "StoIHT",
    "keep_largest",
]
