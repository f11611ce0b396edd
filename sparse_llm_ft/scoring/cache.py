"""A content-addressed store of derivations: the key says everything that the result depends on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparse_llm_ft.errors import CheckpointError
from sparse_llm_ft.io.atomic import verify_folder, write_folder
from sparse_llm_ft.io.strict_json_yaml import read_json
from sparse_llm_ft.scoring.derivation import Derivation

VERSION = 1
TENSORS, METADATA = "importance.safetensors", "derivation.json"
_LOGGER = logging.getLogger(__name__)


def content_key(**parts: Any) -> str:
    """SHA-256, in hex, of the canonical JSON of `parts`; it depends on no order of keys.

    Raises:
        TypeError, ValueError: a part that is no JSON value.
    """
    return _digest(parts)


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 of names and contents, whatever the order of `paths`. Raises OSError where one cannot be read."""
    entries = []
    for path in paths:
        with path.open("rb") as file:
            entries.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
    return _digest(sorted(entries))


def hash_samples(samples: Iterable[Any]) -> str:
    """SHA-256 of samples in their order; a sample is a dataclass of JSON values, or a JSON value."""
    return _digest([asdict(s) if is_dataclass(s) and not isinstance(s, type) else s for s in samples])


def load(folder: Path, key: str, warn: Callable[[str], object] = _LOGGER.warning) -> Derivation | None:
    """What `save` stored under `key`; None where there is nothing, or nothing that can be used.

    Args:
        warn: called with one line where an entry is there but damaged.
    """
    entry = folder / key
    if not entry.is_dir():
        return None
    try:
        verify_folder(entry, (TENSORS, METADATA))
        metadata = read_json(entry / METADATA, constants=True)
        if metadata.pop("version") != VERSION:
            raise ValueError("it is of another version")
        return Derivation.from_tensors(load_file(entry / TENSORS), metadata)
    except (CheckpointError, OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        warn(f"{entry}: the stored derivation cannot be used and is made anew ({error})")
        return None


def save(folder: Path, key: str, derivation: Derivation) -> None:
    """Store `derivation` under `key`, atomically; an entry that is there and whole stays.

    Processes that save at once take turns by a lock on the folder. Raises OSError where the folder cannot be written.
    """

    def fill(temporary: Path) -> None:
        tensors, metadata = derivation.to_tensors()
        save_file(tensors, temporary / TENSORS)
        text = json.dumps({"version": VERSION, **metadata}, indent=1)
        (temporary / METADATA).write_text(text + "\n", encoding="utf-8")

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if load(folder, key, warn=lambda message: None) is None:
            write_folder(folder / key, fill)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
