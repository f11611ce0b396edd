"""Atomic writes: a folder or file is written aside, synced, checksummed, and renamed into place."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from sparse_llm_ft.errors import CheckpointError, lacks_room, may_pass
from sparse_llm_ft.io.strict_json_yaml import ParseError, read_json

MANIFEST = "manifest.json"
_LOGGER = logging.getLogger(__name__)
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
"""How a rename onto a folder with files, or onto a file, fails."""
_WRITER = re.compile(r"(?P<host>[^@]+)-(?P<pid>[0-9]+)\.[0-9]+")
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


def write_folder(target: Path, fill: Callable[[Path], None], manifest: bool = True) -> None:
    """Replace `target` by the files that `fill` writes, or leave it unchanged.

    `fill` writes into an empty temporary folder beside `target`. This function gives its files, also those in folders,
    the rights that the umask gives, lists them with size and SHA-256 in ``manifest.json``, syncs them to disk, and
    renames the folder. An error leaves nothing. A crash leaves at most a ``.tmp-`` folder, which the next write of the
    same target removes. An older `target` moves aside first and is removed last: a crash in between leaves it under
    that name (`restore_replaced`).

    Args:
        manifest: whether to write ``manifest.json``, for which every file is read once more.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".tmp-{target.name}"
    replaced = target.parent / f".old-{target.name}"
    remove_folder(replaced)
    if replaced.exists():
        replaced = target.parent / f".old-{target.name}-{os.getpid()}-{time.time_ns()}"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        fill(temporary)
        _finish(temporary, manifest)
    except BaseException as error:  # a full disk keeps no half of a checkpoint
        remove_folder(temporary)
        if isinstance(error, Exception) and lacks_room(error):  # most such errors name no file
            number = (error.errno if isinstance(error, OSError) else None) or errno.ENOSPC
            raise OSError(number, os.strerror(number), str(target)) from error
        raise
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    _sync(target.parent)
    remove_folder(replaced)


def write_new_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """`write_folder` for a place where nothing may be replaced, and where several processes may write at once.

    Raises:
        FileExistsError: `target` came into being meanwhile, and is no empty folder. It stays as it is.
    """
    with new_folder(target) as draft:
        fill(draft)
        _finish(draft, manifest=True)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, which takes its name when the body ends, and is removed where the body raises.

    Raises:
        FileExistsError: as `write_new_folder`.
    """
    with draft_of(target) as draft:
        yield draft
        try:
            draft.rename(target)  # the system refuses a folder with files in it, and a file
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            reason = "came into being meanwhile; expected a new folder"
            raise FileExistsError(errno.EEXIST, reason, str(target)) from None
        _sync(target.parent)


def rename_numbered(draft: Path, stem: Path) -> Path:
    """Give a folder the name ``stem-N`` with the smallest number N that is free now; other processes may do so at once.
    Returns its new place.
    """
    for number in count(1):
        target = stem.with_name(f"{stem.name}-{number}")
        try:
            draft.rename(target)  # the system refuses a folder with files in it, and a file
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        else:
            _sync(target.parent)
            return target
    raise AssertionError("numbers do not end")


@contextmanager
def draft_of(target: Path) -> Iterator[Path]:
    """An empty folder of this process beside `target`, removed at the end if it still has its name.

    A process that is killed leaves its own; the next one on this host that writes the same target removes it.
    """
    remove_dead_drafts(target)
    draft = _own_name(target)
    draft.mkdir(parents=True)
    try:
        yield draft
    finally:
        remove_folder(draft)


def remove_dead_drafts(target: Path) -> None:
    """Remove what dead processes of this host left of `target`."""
    for draft in target.parent.glob(f"{glob.escape(f'.tmp-{target.name}@')}*"):
        writer = _WRITER.fullmatch(draft.name.removeprefix(f".tmp-{target.name}@"))
        if writer is None:  # of a target whose own name has an @
            continue
        if writer["host"] == _host() and not _lives(int(writer["pid"])):
            _remove(draft)


def _own_name(target: Path) -> Path:
    """A name beside `target` that no other thread of any process uses. What an earlier process with this one's number
    left there is removed.
    """
    name = target.with_name(f".tmp-{target.name}@{_host()}-{os.getpid()}.{threading.get_native_id()}")
    _remove(name)
    return name


def _host() -> str:
    """Where a process number means one process: a host, and there a container, which may have the host's name."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}.{space.stat().st_ino}" if space.exists() else socket.gethostname()


def _remove(draft: Path) -> None:
    if draft.is_dir() and not draft.is_symlink():
        remove_folder(draft)
    else:
        with suppress(OSError):  # another user's, who has died
            draft.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # the latter: no process ever had this number
        return False
    except PermissionError:  # another user's
        return True
    return True


def _finish(folder: Path, manifest: bool) -> None:
    """Give a folder's files their rights, list them in the manifest, and sync them."""
    entries = sorted(folder.rglob("*"))
    folders = [path for path in entries if path.is_dir()]
    files = [path for path in entries if not path.is_dir()]
    if manifest:
        listed = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in files
        }
        (folder / MANIFEST).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
        files.append(folder / MANIFEST)
    rights = folder.stat().st_mode & 0o777  # as the umask gives them
    for path in files:
        path.chmod(rights & 0o666)  # safetensors, for one, creates files that only their owner can read
    for path in folders:
        path.chmod(rights)
    for path in (*files, *folders, folder):
        _sync(path)


def restore_replaced(parent: Path, names: re.Pattern[str]) -> None:
    """Give a folder in `parent` its name again that a crash has left aside while `write_folder` replaced it.

    Args:
        names: matches the beginning of ``NAME`` in ``.old-NAME``; what it matches is the folder's name.
    """
    for aside in sorted(parent.glob(".old-*")):
        found = names.match(aside.name.removeprefix(".old-"))
        if found is not None and not (parent / found[0]).exists():
            aside.rename(parent / found[0])


def remove_folder(folder: Path) -> None:
    """Remove a folder that nobody needs, as far as that is possible.

    NFS keeps a file that a process of this host has open or mapped, under another name, and the folder with it. A run
    maps the checkpoint that it has resumed from.
    """
    shutil.rmtree(folder, ignore_errors=True)


def write_file(target: Path, text: str) -> None:
    """Replace one text file atomically: readers and crashes see the old or the new text, never a part. Of several
    processes that write it at once, the last one's text stays.

    A link at `target` is replaced; the file it points to stays unchanged.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_dead_drafts(target)
    temporary = _own_name(target)
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(target.parent)


def verify_folder(folder: Path, required: Collection[str] = ()) -> None:
    """Check that the folder holds exactly the files of its manifest, by size and SHA-256.

    Only plain files count: links and folders are refused.

    Args:
        required: files that the manifest must list.

    Raises:
        CheckpointError: names the folder, the file and the problem.
        OSError: the file server is away.
    """
    if folder.is_symlink():
        raise CheckpointError(f"{folder}: a link, not a folder")
    entries = _manifest(folder)
    for name in required:
        if name not in entries:
            raise CheckpointError(f"{folder}: {name} is not in {MANIFEST}")
    with os.scandir(folder) as found:
        plain = {entry.name: entry.is_file(follow_symlinks=False) for entry in found}
    for name, is_plain in plain.items():
        if not is_plain:
            raise CheckpointError(f"{folder}: {name} is missing or not a plain file")
        if name not in entries and name != MANIFEST:
            raise CheckpointError(f"{folder}: {name} is not in {MANIFEST}")
    for name, (size, digest) in entries.items():
        if name not in plain:  # also true of a name that points outside the folder
            raise CheckpointError(f"{folder}: {name} is missing or not a plain file")
        path = folder / name
        if path.stat().st_size != size:
            raise CheckpointError(f"{folder}: {name} has {path.stat().st_size} bytes, not {size!r:.40}")
        if _sha256(path) != digest:
            raise CheckpointError(f"{folder}: {name} differs from its checksum")


def is_whole(folder: Path) -> bool:
    """Whether every file of the manifest has its full size. Enough for data that can be rebuilt."""
    try:
        entries = _manifest(folder)
        return all((folder / name).stat().st_size == size for name, (size, _) in entries.items())
    except (OSError, CheckpointError):
        return False


def _manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """File name -> (bytes, SHA-256)."""
    path = folder / MANIFEST
    if path.is_symlink():
        raise CheckpointError(f"{folder}: {MANIFEST} is missing or not a plain file")
    try:
        manifest = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {MANIFEST} is missing") from None
    except (OSError, ParseError) as error:
        if may_pass(error):
            raise
        reason = str(error) if isinstance(error, ParseError) else type(error).__name__
        raise CheckpointError(f"{folder}: {MANIFEST} is not readable ({reason})") from None
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{folder}: {MANIFEST} is not readable (a JSON object is needed)")
    for name, entry in manifest.items():
        kinds = {key: type(value) for key, value in entry.items()} if isinstance(entry, dict) else None
        if kinds != {"bytes": int, "sha256": str}:
            raise CheckpointError(f"{folder}: {MANIFEST} is not readable ({name!r:.60} has no bytes and sha256)")
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush the file's content, or the folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC or not path.is_dir():
            raise
        _warn_once(path.stat().st_dev, path.parent)
    finally:
        os.close(descriptor)


_warned: set[int] = set()


def _warn_once(device: int, folder: Path) -> None:
    if device in _warned:
        return
    _warned.add(device)
    _LOGGER.warning(
        "%s: this file system cannot sync folders; after a power failure the newest files there may be missing", folder
    )
