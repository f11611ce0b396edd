"""A cache on disk. Each entry is a folder, named by the hash of all its content depends on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from sparse_llm_ft.errors import CheckpointError
from sparse_llm_ft.io.atomic import write_folder
from sparse_llm_ft.io.folder_lock import FolderLock

_LOGGER = logging.getLogger(__name__)
T = TypeVar("T")


def content_key(**parts: Any) -> str:
    """Hex SHA-256 of the canonical JSON of `parts`; key order does not matter.

    Raises:
        TypeError, ValueError: a part is not a JSON value.
    """
    return hash_json(parts)


def hash_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value. Raises as `content_key`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """Hex SHA-256 of names and contents, in any order of `paths`. Raises OSError if a file is not readable."""
    entries = []
    for path in paths:
        with path.open("rb") as file:
            entries.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
    return hash_json(sorted(entries))


@dataclass(frozen=True)
class ContentCache(Generic[T]):
    """Entries in `folder`, which processes may share. One process writes an entry, and no reader sees a partial one.

    Attributes:
        read: verifies an entry's folder and returns its content. It raises OSError, ValueError or CheckpointError
            for an unusable entry.
        manifest: as in `write_folder`.
    """

    folder: Path
    read: Callable[[Path], T]
    manifest: bool = True

    def load(self, key: str, warn: Callable[[str], object] = _LOGGER.warning) -> T | None:
        """The entry's content; None if it is missing or unusable. Needs no write permission.

        Args:
            warn: called with one line about an unusable entry.
        """
        entry = self.folder / key
        if not entry.is_dir():
            return None
        try:
            return self.read(entry)
        except (OSError, ValueError, CheckpointError) as error:
            warn(f"{entry}: the stored entry cannot be used and is made anew ({error})")
            return None

    def write(self, key: str, fill: Callable[[Path], None], warn: Callable[[str], object] = _LOGGER.warning) -> None:
        """Let `fill` write the entry into an empty folder, unless a usable one exists. Other processes wait.

        Args:
            warn: as for `load`.

        Raises:
            OSError: the cache is not writable.
        """
        if self.load(key, warn) is not None:  # before locking, which a read-only cache does not allow
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(self.folder, f".{key}.lock")
        lock.wait()
        try:
            if self.load(key, _ignore) is None:  # another process may have written it meanwhile
                write_folder(self.folder / key, fill, self.manifest)
        finally:
            lock.release()


def _ignore(message: str) -> None:
    """Stands in for `warn` once the entry has been warned about."""
