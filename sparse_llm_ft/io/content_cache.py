"""A cache on disk: each entry is a folder named by the hash of everything that its content depends on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from filelock import FileLock

from sparse_llm_ft.errors import CheckpointError
from sparse_llm_ft.io.atomic import write_folder

_LOGGER = logging.getLogger(__name__)
T = TypeVar("T")


def content_key(**parts: Any) -> str:
    """SHA-256, in hex, of the canonical JSON of `parts`; the order of keys does not matter.

    Raises:
        TypeError, ValueError: a part is no JSON value.
    """
    return hash_json(parts)


def hash_json(value: Any) -> str:
    """SHA-256, in hex, of a JSON value. Raises as `content_key`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 of names and contents, whatever the order of `paths`. Raises OSError where one cannot be read."""
    entries = []
    for path in paths:
        with path.open("rb") as file:
            entries.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
    return hash_json(sorted(entries))


@dataclass(frozen=True)
class ContentCache(Generic[T]):
    """Entries in `folder`. Processes may share it: an entry is complete or not there, and one process writes it.

    Attributes:
        read: verifies an entry's folder and returns what it holds. It raises OSError, ValueError or CheckpointError
            where the entry cannot be used.
    """

    folder: Path
    read: Callable[[Path], T]

    def load(self, key: str, warn: Callable[[str], object] = _LOGGER.warning) -> T | None:
        """What the entry holds; None where there is none, or one that cannot be used. Needs no right to write.

        Args:
            warn: called with one line where the entry cannot be used.
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
        """Let `fill` write the entry into an empty folder, unless a good one is there. Other processes wait.

        Args:
            warn: as of `load`.

        Raises:
            OSError: the cache cannot be written.
        """
        if self.load(key, warn) is not None:  # before the lock, which a read-only cache does not give
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f".{key}.lock"):
            if self.load(key, _ignore) is None:  # another process may have written it meanwhile
                write_folder(self.folder / key, fill)


def _ignore(message: str) -> None:
    """For a damaged entry that has been warned about already."""
