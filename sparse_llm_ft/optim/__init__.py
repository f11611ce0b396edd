"""Optimizers that know adapters: eager AdamW/SGD, and StoIHT on omega."""

from sparse_llm_ft.optim.adapter_optimizer import MOMENTS, AdapterOptimizer
from sparse_llm_ft.optim.iht import CutRule, StoIHT, keep_largest

__all__ = ["MOMENTS", "AdapterOptimizer", "CutRule", "StoIHT", "keep_largest"]
