"""One process at a time in a folder: the kernel's lock, or a file with a heartbeat where a file system has no locks."""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from sparse_llm_ft.io.strict_json_yaml import ParseError, read_json

LOCK_FILE, OWNER_FILE = ".lock", ".lock-owner"
BEAT_SECONDS, STALE_SECONDS, LOOK_SECONDS = 10.0, 60.0, 0.5
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What flock fails with on a file system that has no locks."""


class FolderLock:
    """Held until this process ends, however it ends, or until `release`.

    The lock is the kernel's flock on ``.lock``. NFS without a lock daemon, Lustre mounted without ``-o flock`` and some
    FUSE file systems refuse it. There the owner is who creates ``.lock-owner``, with its host and pid, and touches it
    every ten seconds. A file that names a dead process of this host, or that nobody has touched for a minute, is stale.

    Args:
        name: of the file that is locked; the owner's has ``-owner`` behind it.
    """

    def __init__(self, folder: Path, name: str = LOCK_FILE) -> None:
        self.folder, self.lock, self.owner = folder, folder / name, folder / f"{name}-owner"
        self._file: IO[str] | None = None
        self._claimed, self._released = False, threading.Event()

    def acquire(self) -> None:
        """Take the folder, which must exist.

        Without the kernel's locks this takes up to a minute if another host's process has died with the folder: the
        next job of a chain may begin a second later.

        Raises:
            BlockingIOError: another process holds it.
            OSError: it cannot be written.
        """
        descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        self._file = os.fdopen(descriptor, "w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self._claim()

    def wait(self) -> None:
        """Take the folder as soon as no other process holds it.

        Raises:
            OSError: it cannot be written.
        """
        while True:
            try:
                self.acquire()
                return
            except BlockingIOError:
                time.sleep(LOOK_SECONDS)

    def release(self) -> None:
        """Let others have the folder; the end of the process does the same."""
        if self._file is not None:
            self._file.close()
        if not self._released.is_set() and self._claimed:
            self.owner.unlink(missing_ok=True)
            atexit.unregister(self.release)
        self._released.set()

    def _claim(self) -> None:
        """Create the owner's file, in place of one that is stale."""
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
        if self._is_abandoned():
            self.owner.unlink(missing_ok=True)
        try:
            descriptor = os.open(self.owner, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            raise BlockingIOError(errno.EAGAIN, f"held by {self._describe()}") from None
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(mine))
        time.sleep(0.2)  # two that found the same stale file may both have removed it, the second one this claim
        if self._read() != mine:
            raise BlockingIOError(errno.EAGAIN, f"held by {self._describe()}")
        self._claimed = True
        threading.Thread(target=self._beat, name="folder-lock", daemon=True).start()
        atexit.register(self.release)

    def _is_abandoned(self) -> bool:
        """Whether the owner's file is stale. It waits for another host's next beat, whose clock may be another one."""
        before = self._touched()
        end = time.monotonic() + STALE_SECONDS
        while before is not None and not self._is_stale():
            owner = self._read() or {}
            if owner.get("host") == socket.gethostname() or self._touched() != before or time.monotonic() > end:
                return False
            time.sleep(LOOK_SECONDS)
        return before is not None

    def _touched(self) -> int | None:
        """When the owner's file was touched last, in ns; None where there is none."""
        try:
            return self.owner.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _is_stale(self) -> bool:
        owner = self._read()
        if owner is None:
            return False
        if owner.get("host") == socket.gethostname():
            return not _is_alive(owner.get("pid"))
        clock = self.folder / f"{self.owner.name}-{socket.gethostname()}-{os.getpid()}"
        clock.touch()  # by the file server's clock, not by this host's
        try:
            return clock.stat().st_mtime - self.owner.stat().st_mtime > STALE_SECONDS
        except FileNotFoundError:
            return False
        finally:
            clock.unlink(missing_ok=True)

    def _read(self) -> Mapping[str, object] | None:
        """What the owner's file says; empty where it is not readable, None where there is none."""
        try:
            owner = read_json(self.owner)
        except FileNotFoundError:
            return None
        except (OSError, ParseError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _describe(self) -> str:
        owner = self._read() or {}
        return f"process {owner.get('pid')} on {owner.get('host')}"

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                os.utime(self.owner)
            except OSError:
                continue  # the server is away; the next beat may reach it


def _is_alive(pid: object) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True
