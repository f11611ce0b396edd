"""What identifies the rows of a split: the contents of its files, or the hub's fingerprint."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from sparse_llm_ft.data.reading import hub_rows, split_files
from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.errors import UserError

_END = 2**20


def source_of(task: Task, split: str, further: str | None) -> list[str]:
    """Identifies the rows: a local file's name and SHA-256, or the fingerprint of a hub data set."""
    files = split_files(task, split, further)
    if not files:
        splits = task.splits if further is None else task.further_splits[further]
        rows: Any = hub_rows(task, splits[split])
        return [str(task.hub_id), rows._fingerprint]
    found = []
    for path in files:
        try:
            with path.open("rb") as file:
                found += [path.name, hashlib.file_digest(file, "sha256").hexdigest()]
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None
    return found


def ends_of(path: Path) -> list[Any]:
    """A file's size, and the SHA-256 of its first and its last mebibyte."""
    with path.open("rb") as file:
        first, size = file.read(_END), os.fstat(file.fileno()).st_size
        file.seek(max(size - _END, 0))
        last = file.read(_END)
    return [size, *(hashlib.sha256(end).hexdigest() for end in (first, last))]
