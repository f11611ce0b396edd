"""Exports a trained run: as PEFT adapter, as merged weights, or as upload with a model card."""
