"""Tiny models with logits that differ."""

from helpers.spread_models import causal, encoder

__all__ = ["causal", "encoder"]
