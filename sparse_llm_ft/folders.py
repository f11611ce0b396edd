"""Folders that are either complete or not there: written aside, synced, checksummed, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from sparse_llm_ft.errors import CheckpointError

MANIFEST = "manifest.json"


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make `target` hold what `fill` writes, or leave it as it was.

    `fill` gets an empty temporary folder beside `target`. Its files are synced to disk and listed with size and
    SHA-256 in ``manifest.json``; then the folder is renamed. A crash leaves at most a ``.tmp-`` folder, which the
    next write of the same target removes. An older `target` is set aside first and removed last.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".tmp-{target.name}"
    replaced = target.parent / f".old-{target.name}"
    for left_over in (temporary, replaced):
        if left_over.exists():
            shutil.rmtree(left_over)
    temporary.mkdir()
    fill(temporary)
    files = sorted(path for path in temporary.iterdir())
    manifest = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in (*files, temporary / MANIFEST, temporary):
        _sync(path)
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    _sync(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def write_file(target: Path, text: str) -> None:
    """Replace one text file at once: a reader, or a crash, sees the old or the new text, never a part."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".tmp-{target.name}"
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.rename(target)
    _sync(target.parent)


def verify_folder(folder: Path) -> None:
    """Check every file of the manifest by size and SHA-256.

    Raises:
        CheckpointError: naming the folder, the file and what is wrong with it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {MANIFEST} is missing") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} is not readable ({type(error).__name__})") from None
    for name, (size, digest) in entries.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing or not a plain file")
        if path.stat().st_size != size:
            raise CheckpointError(f"{folder}: {name} has {path.stat().st_size} bytes, not {size}")
        if _sha256(path) != digest:
            raise CheckpointError(f"{folder}: {name} differs from its checksum")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
