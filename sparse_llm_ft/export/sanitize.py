"""A run's settings without machine-specific values: local folders are reduced to their last name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparse_llm_ft.config import RunConfig

_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
"""DeepSpeed's monitoring sections, which name places and accounts."""


def public_settings(config: RunConfig) -> dict[str, Any]:
    """The settings as plain values; local paths are reduced to their last name, and a node's own folder is left out."""
    tree = config.model_dump(mode="json")
    tree["model"]["name"] = public_name(config.model.name)
    tree["model"]["stage_to"] = None
    if config.task.path is not None:
        tree["task"]["path"] = _last(config.task.path)
    tree["output_dir"] = _last(config.output_dir)
    tree["method"] = _without_paths(tree["method"])
    tree["deepspeed"] = _without_paths({key: v for key, v in tree["deepspeed"].items() if key not in _MONITORS})
    return tree


def public_name(name: str) -> str:
    """A hub id unchanged, or a local folder's last name."""
    return _last(name) if is_local(name) else name


def is_local(name: str) -> bool:
    """Whether a model's or data set's name is a local folder, which need not exist any more."""
    return name.startswith(("/", "~", ".")) or name.count("/") > 1 or Path(name).exists()


def _last(path: str) -> str:
    return Path(path).absolute().name or "folder"


def _without_paths(value: Any) -> Any:
    """The tree with every absolute path reduced to its last name."""
    if isinstance(value, dict):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    return _last(value) if isinstance(value, str) and value.startswith(("/", "~")) else value
