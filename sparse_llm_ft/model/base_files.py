"""The files of a base: in a local folder or the hub's cache, and where a node keeps its copy. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.distributed.world import node_name
from sparse_llm_ft.errors import ConfigError, reaching, reason_of

_WEIGHTS = "*.safetensors"
_OTHERS = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken")
"""Settings and tokenizers; the model's own code only where a run may run it."""
_OTHER_FORMATS = ("original/*", "onnx/*", "gguf/*", "consolidated*")
"""The weights again, which some repositories keep beside those that transformers reads."""


def fetch_model(model: ModelConfig, only_cached: bool = False) -> Path:
    """The model's folder: a local one as it is, one from the hub once all of its files are in the cache.

    Args:
        only_cached: ask the hub for nothing.

    Raises:
        ConfigError: the hub does not have it, or does not give it.
    """
    if Path(model.name).expanduser().is_dir():
        return Path(model.name).expanduser()
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            model.name,
            revision=model.revision,
            allow_patterns=_patterns(model),
            ignore_patterns=list(_OTHER_FORMATS),
            local_files_only=only_cached,
        )
    except Exception as error:  # of the hub, of the network, of the disk
        raise ConfigError(
            "model.name",
            f"{model.name!r} cannot be fetched ({type(error).__name__}: {reason_of(error, 200)})",
            "expected a hub id that this machine may read, or a folder",
        ) from error
    return Path(found)


def files_of(model: ModelConfig, folder: Path) -> dict[str, os.stat_result]:
    """Name -> size and times of each file in the model's `folder` that loading may read. Links are followed."""
    found = {path.name: path for pattern in _patterns(model) for path in sorted(folder.glob(pattern))}
    wanted = {name: path for name, path in found.items() if not Path(name).match("consolidated*")}
    return {name: path.stat() for name, path in wanted.items() if path.is_file()}


def stage_folder(setting: str) -> Path:
    """The folder that ``model.stage_to`` names on this node. It need not exist yet.

    Raises:
        ConfigError: a variable in it is not set on this node; the path is relative; the folder cannot be written.
    """
    folder, where = Path(os.path.expandvars(setting)).expanduser(), f"on {node_name()}"
    if "$" in str(folder):
        raise ConfigError(
            "model.stage_to",
            f"{setting!r} names a variable that is not set {where}",
            "expected a folder on each node's own disk",
        )
    if not folder.is_absolute():
        raise ConfigError(
            "model.stage_to", f"{setting!r} is relative", "expected the absolute path of a folder on each node's disk"
        )
    with reaching("model.stage_to"):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            "model.stage_to", f"{setting!r}: {existing} cannot be written {where}", "expected a folder that can"
        )
    return folder


def _patterns(model: ModelConfig) -> list[str]:
    return [_WEIGHTS, *_OTHERS, *(["*.py"] if model.trust_remote_code else [])]
