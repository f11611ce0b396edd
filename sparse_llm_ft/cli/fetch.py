"""The command `fetch`: everything that a run reads from a network, into the caches, on a node that has one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparse_llm_ft.config import RunConfig, load_config, split_arguments
from sparse_llm_ft.config.schema import ModelConfig
from sparse_llm_ft.distributed.world import World
from sparse_llm_ft.errors import ConfigError, UserError, reason_of

_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken")
"""Weights without pickle, settings, and tokenizers; the model's own code only where a run may run it."""


def add_command(commands: Any, check: Callable[[RunConfig, World], list[str]]) -> None:
    """Enter the command among those of the command line.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
        check: reads and tokenises the data as a run on these processes would; returns lines about the run.
    """
    fetch = commands.add_parser(
        "fetch",
        help="fill the caches with a run's model and tokenised data; the run then needs no network (HF_HUB_OFFLINE=1)",
    )
    fetch.add_argument("--config", nargs="+", required=True, metavar="FILE")
    fetch.add_argument("--processes", type=int, default=1, help="how many processes the run will have")
    fetch.set_defaults(command=lambda options: _fetch(options, check))


def _fetch(options: argparse.Namespace, check: Callable[[RunConfig, World], list[str]]) -> None:
    if options.processes < 1:
        raise UserError(f"--processes {options.processes}: expected 1 or more")
    config = load_config(*split_arguments(options.config))
    folder = fetch_model(config.model)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"model: {folder} ({size / 2**30:.1f} GiB)")
    print(*check(config, World(0, options.processes, 0, options.processes)), sep="\n")
    print("the run needs no network now: set HF_HUB_OFFLINE=1 there, and the same HF_HOME")


def fetch_model(model: ModelConfig) -> Path:
    """The model's folder: a local one as it is, one from the hub once all of its files are in the cache.

    Raises:
        ConfigError: the hub does not have it, or does not give it.
    """
    if Path(model.name).expanduser().is_dir():
        return Path(model.name).expanduser()
    from huggingface_hub import snapshot_download

    patterns = [*_FILES, "*.py"] if model.trust_remote_code else list(_FILES)
    # Other formats of the weights, which some repositories keep in folders of their own.
    others = ["original/*", "onnx/*", "gguf/*", "consolidated*"]
    try:
        found = snapshot_download(model.name, revision=model.revision, allow_patterns=patterns, ignore_patterns=others)
    except Exception as error:  # of the hub, of the network, of the disk
        raise ConfigError(
            "model.name",
            f"{model.name!r} cannot be fetched ({type(error).__name__}: {reason_of(error, 200)})",
            "expected a hub id that this machine may read, or a folder",
        ) from error
    return Path(found)
