"""Runs on a model whose every layer shows in the logits."""

from helpers.loud_models import loud_folder, settings

__all__ = ["loud_folder", "settings"]
