"""``model.stage_to``: a copy of the base's files on each node's own disk, made once for all of its processes and jobs.

A copy lies in a folder whose name depends on where the files came from, their sizes and their times: a base that has
changed is copied again. It gets this name when it is complete, so that nobody takes a part of a copy for all of it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.distributed.collectives import run_on_local_leaders
from sparse_llm_ft.distributed.world import World, node_name
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.io.content_cache import ContentCache, content_key
from sparse_llm_ft.io.wait import GIB, Wait
from sparse_llm_ft.model.base_files import fetch_model, files_of, stage_folder

_AT_ONCE = 16 * 2**20
"""Bytes that are copied at a time."""


def stage_base(model: ModelConfig, world: World, console: Console) -> ModelConfig:
    """Collective. The settings with the node's own copy of the base as ``name``; as they are without ``stage_to``.

    The first process of each node makes the copy if there is none yet, while the others wait.

    Raises:
        UserError: on every rank, if a node's disk has no room or cannot be written, or the base cannot be read.
    """
    if model.stage_to is None:
        return model
    setting = model.stage_to
    run_on_local_leaders(world, lambda: _copy(model, stage_folder(setting), console))
    copy = stage_folder(setting) / _key(model, fetch_model(model, only_cached=True))
    return model.model_copy(update={"name": str(copy), "revision": None})


def keep_name(base: PreTrainedModel, model: ModelConfig) -> None:
    """Let a base that was loaded from a copy say where it is from: PEFT and transformers write its name into files."""
    base.name_or_path = base.config._name_or_path = model.name


def _copy(model: ModelConfig, folder: Path, console: Console) -> None:
    source = fetch_model(model)
    files, key = files_of(model, source), _key(model, source)

    def check(entry: Path) -> Path:
        """Raise OSError unless the copy is complete and this user's; on a shared disk it might be a stranger's."""
        if entry.is_symlink() or entry.stat().st_uid not in (os.getuid(), 0):
            raise PermissionError(f"{entry} belongs to another user")
        for name, stat in files.items():
            if (entry / name).stat().st_size != stat.st_size:
                raise OSError(f"{entry / name} is cut short")
        return entry

    def fill(temporary: Path) -> None:
        try:
            _check_room(temporary, model, files)
            with Wait(console, f"copying {model.name} to {folder}", unit="bytes") as wait:
                _copy_files(source, temporary, files, wait)
        except BaseException:
            shutil.rmtree(temporary)  # leave no part of a copy on a disk that is full
            raise

    try:
        ContentCache(folder, check, manifest=False).write(key, fill, warn=console.log)
    except OSError as error:
        raise ConfigError(
            "model.stage_to",
            f"{model.stage_to!r}: {model.name} cannot be copied there on {node_name()} ({error})",
            "expected a folder on each node's own disk",
        ) from error


def _key(model: ModelConfig, source: Path) -> str:
    """The name of the copy's folder: ``Llama-3-8B-`` and a hash of the files' place, sizes and times."""
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files_of(model, source).items()}
    hashed = content_key(source=str(source.resolve()), files=files)
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', Path(model.name).name)[:100]}-{hashed[:16]}"


def _check_room(folder: Path, model: ModelConfig, files: Mapping[str, os.stat_result]) -> None:
    needed, free = sum(stat.st_size for stat in files.values()), shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            "model.stage_to",
            f"{model.stage_to!r} has {free / GIB:.1f} GiB free on {node_name()}",
            f"expected {needed / GIB:.1f} GiB for the files of {model.name}, or another folder",
        )


def _copy_files(source: Path, target: Path, files: Mapping[str, os.stat_result], wait: Wait) -> None:
    """Copy the files' contents.

    Raises:
        OSError: a file cannot be read or written, or changed meanwhile.
    """
    total, done = sum(stat.st_size for stat in files.values()), 0
    for name, stat in files.items():
        with (source / name).open("rb") as read, (target / name).open("xb") as write:
            while part := read.read(_AT_ONCE):
                write.write(part)
                done += len(part)
                wait.at(done, total)
        if (target / name).stat().st_size != stat.st_size:
            raise OSError(f"{source / name} has changed while it was copied")
