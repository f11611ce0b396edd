"""Sparse adapter fine-tuning of Llama models on DeepSpeed ZeRO.

A run is a sequence of phases; each phase trains one `AdapterPlan`; a method is the rule that turns what one phase
measured into the next phase's plan. See docs/architecture.md.
"""

__version__ = "0.2.0"
